#include "weft/model/progress.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <thread>
#include <vector>

#include "weft/model/test_files.h"

namespace weft {
namespace {

using testing::Mentions;

TEST(FormatProgress, ShowsShareSpeedAndTimeLeft) {
  EXPECT_EQ(FormatProgress("Load", 500'000'000, 2'000'000'000, 2.0, 0), "Load  25% 0.5/2.0 GB, 0.25 GB/s, ETA 6 s");
  EXPECT_EQ(FormatProgress("Load", 0, 2'000'000, 0.0, 0), "Load   0% 0.0/2.0 MB");
  EXPECT_EQ(FormatProgress("Load", 1'000'000'000, 101'000'000'000, 1.0, 0),
            "Load   0% 1.0/101.0 GB, 1.00 GB/s, ETA 1:40 min");
  EXPECT_TRUE(Mentions(FormatProgress("Load", 1'000'000'000, 10'001'000'000'000, 1.0, 0), "ETA 2:46 h"));
  EXPECT_TRUE(Mentions(FormatProgress("Load", 1999, 2000, 1.0, 0), " 99%"));
  EXPECT_TRUE(Mentions(FormatProgress("Load", 5000, 2000, 1.0, 0), "100%"));
}

TEST(FormatProgress, TheBarFitsTheTerminal) {
  EXPECT_TRUE(
      Mentions(FormatProgress("Load", 1, 2, 0.0, 120), "|" + std::string(15, '#') + std::string(15, ' ') + "|"));
  for (int columns = 0; columns < 150; ++columns) {
    const std::string line = FormatProgress("Load", 500'000'000, 2'000'000'000, 2.0, columns);
    const bool bar = line.find('|') != line.npos;
    EXPECT_TRUE(!bar || static_cast<int>(line.size()) <= columns) << columns << ": " << line;
  }
}

TEST(LoadProgress, CountsFromManyThreadsAndLogs) {
  std::vector<std::string> lines;  // log_line is called by one thread at a time
  LoadProgress::Options options;
  options.mode = LoadProgress::Mode::kLog;
  options.log_every = std::chrono::milliseconds(0);
  options.log_line = [&](const std::string& line) { lines.push_back(line); };
  LoadProgress progress("Load", 4'000'000, options);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 1000; ++i) progress.Add(1000);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(progress.done_bytes(), 4'000'000);
  ASSERT_FALSE(lines.empty());
  EXPECT_TRUE(Mentions(lines[0], "/4.0 MB"));
  progress.Finish();
  progress.Finish();
  EXPECT_TRUE(Mentions(lines.back(), "Load: 4.0 MB in"));
  EXPECT_FALSE(Mentions(lines[lines.size() - 2], "Load: 4.0 MB in"));
}

TEST(LoadProgress, DrawsInPlaceAndLeavesTheLineClean) {
  const testing::TempFolder folder;
  const auto drawn = [&](LoadProgress::Mode mode, bool finish) {
    std::FILE* out = std::fopen(folder.path("out").c_str(), "wb");
    std::string log;
    {
      LoadProgress::Options options;
      options.mode = mode;
      options.out = out;
      options.bar_every = options.log_every = std::chrono::milliseconds(0);
      options.log_line = [&](const std::string& line) { log += line + "\n"; };
      LoadProgress progress("Load", 100, options);
      for (int i = 0; i < 4; ++i) progress.Add(25);
      if (finish) progress.Finish();
    }
    std::fclose(out);
    return testing::ReadAll(folder.path("out")) + "log: " + log;
  };
  const std::string finished = drawn(LoadProgress::Mode::kBar, true);
  EXPECT_EQ(std::count(finished.begin(), finished.end(), '\r'), 5);
  EXPECT_TRUE(Mentions(finished, "\rLoad  50% |"));
  EXPECT_TRUE(Mentions(finished, "\r\x1b[Klog: Load: 0.0 MB in"));
  EXPECT_TRUE(Mentions(drawn(LoadProgress::Mode::kBar, false), "\x1b[K\nlog: "));
  EXPECT_TRUE(Mentions(drawn(LoadProgress::Mode::kAuto, true), "log: Load  25%"));  // a file is no terminal
  EXPECT_EQ(drawn(LoadProgress::Mode::kOff, true), "log: ");
}

}  // namespace
}  // namespace weft
