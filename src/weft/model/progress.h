#pragma once
// Tells the user how far the loading of a model is.

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <mutex>
#include <string>

namespace weft {

// "Loading weights  42% |########            | 1.3/3.1 GB, 0.82 GB/s, ETA 2 s", not longer than `columns` where that
// can be (the bar shrinks and goes away first). `seconds` since the start; total_bytes > 0.
std::string FormatProgress(const std::string& label, int64_t done_bytes, int64_t total_bytes, double seconds,
                           int columns);

// Counts bytes from any thread. On a terminal it draws a bar that is redrawn in place, elsewhere it writes a line to
// the log now and then; the end is one line in both. Work may turn out to be more or less than total_bytes: what is
// shown stops at 100 %.
class LoadProgress {
 public:
  enum class Mode {
    kAuto,  // a bar where stderr is a terminal, else the log
    kBar,
    kLog,
    kOff,
  };
  struct Options {
    Mode mode = Mode::kAuto;
    std::FILE* out = stderr;                           // of the bar
    std::chrono::milliseconds bar_every{100};          // time between two drawings
    std::chrono::milliseconds log_every{5000};         // and between two lines of the log
    std::function<void(const std::string&)> log_line;  // instead of the log, for tests
  };
  LoadProgress(std::string label, int64_t total_bytes, Options options);
  LoadProgress(std::string label, int64_t total_bytes) : LoadProgress(std::move(label), total_bytes, Options()) {}
  // An unfinished bar is left with a line break, so that what comes next (an error) begins on its own line.
  ~LoadProgress();
  LoadProgress(const LoadProgress&) = delete;
  LoadProgress& operator=(const LoadProgress&) = delete;

  // Cheap, thread-safe; draws when it is time to.
  void Add(int64_t bytes);
  // The last line, with the time and speed of the whole. Once; after the last Add.
  void Finish();

  int64_t done_bytes() const { return done_.load(std::memory_order_relaxed); }

 private:
  using Clock = std::chrono::steady_clock;
  void Draw(int64_t done);
  void LogLine(const std::string& line) const;
  double Seconds() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }

  const std::string label_;
  const int64_t total_;
  Options options_;
  const Clock::time_point start_ = Clock::now();
  std::atomic<int64_t> done_{0};
  std::atomic<Clock::rep> next_;  // when to draw again
  std::mutex mutex_;              // one thread draws
  bool drawn_ = false;            // a bar is on the last line of the terminal
  bool finished_ = false;
};

}  // namespace weft
