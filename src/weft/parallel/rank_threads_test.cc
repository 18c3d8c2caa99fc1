#include "weft/parallel/rank_threads.h"

#include <gtest/gtest.h>

#include <chrono>
#include <set>
#include <stdexcept>

#include "weft/core/error.h"
#include "weft/parallel/communicator.h"

namespace weft {
namespace {

TEST(RankThreads, EveryRankOnceARunAlwaysOnItsOwnThread) {
  for (const int ranks : {1, 2, 8}) {
    RankThreads threads(ranks);
    EXPECT_EQ(threads.size(), ranks);
    std::vector<std::thread::id> ids(static_cast<size_t>(ranks));
    std::vector<int> runs(static_cast<size_t>(ranks));  // not atomic: RunOnAll orders the runs
    for (int run = 0; run < 500; ++run) {
      threads.RunOnAll([&](int rank) {
        const auto i = static_cast<size_t>(rank);
        if (run == 0) ids[i] = std::this_thread::get_id();
        EXPECT_EQ(ids[i], std::this_thread::get_id());
        ++runs[i];
      });
      for (const int n : runs) ASSERT_EQ(n, run + 1);
      // Now and then long enough for the threads to fall asleep.
      if (run % 100 == 50) std::this_thread::sleep_for(std::chrono::milliseconds(3));
    }
    EXPECT_EQ(std::set(ids.begin(), ids.end()).size(), static_cast<size_t>(ranks));
    EXPECT_EQ(std::set(ids.begin(), ids.end()).count(std::this_thread::get_id()), 0u);
  }
}

TEST(RankThreads, TheFirstExceptionComesOutAndNobodyHangs) {
  for (const int culprit : {0, 1, 3}) {
    auto group = MakeInProcessGroup(4);
    std::atomic<int> errors{0};
    RankThreads threads(4, [&] {
      ++errors;
      group[0]->Abort();
    });
    try {
      threads.RunOnAll([&](int rank) {
        if (rank == culprit) throw std::runtime_error("rank " + std::to_string(rank) + " broke");
        group[static_cast<size_t>(rank)]->Barrier();
        ADD_FAILURE() << "the barrier opened without the culprit";
      });
      ADD_FAILURE() << "nothing thrown";
    } catch (const std::runtime_error& error) {
      EXPECT_EQ(std::string(error.what()), "rank " + std::to_string(culprit) + " broke");
    }
    EXPECT_EQ(errors.load(), 4);  // the culprit, and the three whose collective was aborted
    // The threads themselves live on, and the error is not reported twice.
    std::atomic<int> ran{0};
    EXPECT_NO_THROW(threads.RunOnAll([&](int) { ++ran; }));
    EXPECT_EQ(ran.load(), 4);
    EXPECT_THROW(threads.RunOnAll([&](int rank) { group[static_cast<size_t>(rank)]->Barrier(); }), Error);
  }
}

TEST(RankThreads, MayBeDestroyedWithoutARun) { RankThreads threads(3); }

}  // namespace
}  // namespace weft
