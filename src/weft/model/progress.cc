#include "weft/model/progress.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>

#include "weft/core/log.h"

namespace weft {
namespace {

constexpr int kMaxBar = 30;

std::string FormatTime(double seconds) {
  const auto whole = static_cast<int64_t>(std::llround(std::clamp(seconds, 0.0, 1e9)));
  if (whole < 60) return fmt::format("{} s", whole);
  if (whole < 3600) return fmt::format("{}:{:02} min", whole / 60, whole % 60);
  return fmt::format("{}:{:02} h", whole / 3600, whole % 3600 / 60);
}

struct Unit {
  const char* name;
  double bytes;
};
Unit UnitOf(int64_t bytes) { return bytes >= 1'000'000'000 ? Unit{"GB", 1e9} : Unit{"MB", 1e6}; }

int TerminalColumns(std::FILE* file) {
  winsize size = {};
  return ioctl(fileno(file), TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

}  // namespace

std::string FormatProgress(const std::string& label, int64_t done_bytes, int64_t total_bytes, double seconds,
                           int columns) {
  const int64_t done = std::clamp<int64_t>(done_bytes, 0, total_bytes);
  const double share = total_bytes > 0 ? static_cast<double>(done) / static_cast<double>(total_bytes) : 1.0;
  const Unit unit = UnitOf(total_bytes);
  const double per_second = seconds > 0 ? static_cast<double>(done) / seconds : 0.0;
  // 100 % only when all is done.
  const std::string head = fmt::format("{} {:3}%", label, static_cast<int>(std::floor(100.0 * share)));
  std::string tail = fmt::format("{:.1f}/{:.1f} {}", static_cast<double>(done) / unit.bytes,
                                 static_cast<double>(total_bytes) / unit.bytes, unit.name);
  if (per_second > 0) {
    tail += fmt::format(", {:.2f} GB/s, ETA {}", per_second / 1e9,
                        FormatTime(static_cast<double>(total_bytes - done) / per_second));
  }
  const int room = columns - static_cast<int>(head.size() + tail.size()) - 4;  // " |" and "| "
  if (room < 5) return fmt::format("{} {}", head, tail);
  const int width = std::min(room, kMaxBar);
  const int filled = static_cast<int>(std::floor(share * width));
  return fmt::format("{} |{}{}| {}", head, std::string(static_cast<size_t>(filled), '#'),
                     std::string(static_cast<size_t>(width - filled), ' '), tail);
}

LoadProgress::LoadProgress(std::string label, int64_t total_bytes, Options options)
    : label_(std::move(label)), total_(std::max<int64_t>(total_bytes, 1)), options_(std::move(options)) {
  if (options_.mode == Mode::kAuto) options_.mode = isatty(fileno(options_.out)) != 0 ? Mode::kBar : Mode::kLog;
  const auto first = options_.mode == Mode::kBar ? options_.bar_every : options_.log_every;
  next_ = (start_ + first).time_since_epoch().count();
}

LoadProgress::~LoadProgress() {
  if (drawn_ && !finished_) {
    std::fputc('\n', options_.out);
    std::fflush(options_.out);
  }
}

void LoadProgress::Add(int64_t bytes) {
  const int64_t done = done_.fetch_add(bytes, std::memory_order_relaxed) + bytes;
  if (options_.mode == Mode::kOff) return;
  const Clock::time_point now = Clock::now();
  if (now.time_since_epoch().count() < next_.load(std::memory_order_relaxed)) return;
  // Who comes while another thread draws goes on working.
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock() || finished_ || now.time_since_epoch().count() < next_.load(std::memory_order_relaxed)) return;
  const auto every = options_.mode == Mode::kBar ? options_.bar_every : options_.log_every;
  next_.store((now + every).time_since_epoch().count(), std::memory_order_relaxed);
  Draw(done);
}

void LoadProgress::Draw(int64_t done) {
  if (options_.mode == Mode::kBar) {
    // One write a drawing; the rest of an older, longer line is erased.
    const int columns = TerminalColumns(options_.out) - 1;
    const std::string line = fmt::format("\r{}\x1b[K", FormatProgress(label_, done, total_, Seconds(), columns));
    std::fwrite(line.data(), 1, line.size(), options_.out);
    std::fflush(options_.out);
    drawn_ = true;
  } else {
    LogLine(FormatProgress(label_, done, total_, Seconds(), 0));
  }
}

void LoadProgress::LogLine(const std::string& line) const {
  if (options_.log_line) {
    options_.log_line(line);
  } else {
    spdlog::info("{}", line);
  }
}

void LoadProgress::Finish() {
  const std::lock_guard lock(mutex_);
  if (finished_) return;
  finished_ = true;
  if (options_.mode == Mode::kOff) return;
  if (drawn_) {  // the line of the log takes the bar's place
    std::fputs("\r\x1b[K", options_.out);
    std::fflush(options_.out);
  }
  const double seconds = Seconds();
  const int64_t done = done_bytes();
  const Unit unit = UnitOf(done);
  LogLine(fmt::format("{}: {:.1f} {} in {:.1f} s ({:.2f} GB/s)", label_, static_cast<double>(done) / unit.bytes,
                      unit.name, seconds, static_cast<double>(done) / 1e9 / std::max(seconds, 1e-9)));
}

}  // namespace weft
