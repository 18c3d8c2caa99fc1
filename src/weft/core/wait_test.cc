#include "weft/core/wait.h"

#include <gtest/gtest.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cstdint>
#include <thread>

namespace weft {
namespace {

// The calling thread's time slice, ns; 0 where the kernel knows none of a thread's own.
uint64_t TimeSlice() {
  std::array<uint64_t, 6> attr{};  // struct sched_attr: sched_runtime lies 24 bytes in
  if (syscall(SYS_sched_getattr, 0, attr.data(), sizeof(attr), 0) != 0) return 0;
  return attr[3];
}

// How often the calling thread has gone to sleep.
int64_t Sleeps() {
  rusage usage{};
  getrusage(RUSAGE_THREAD, &usage);
  return usage.ru_nvcsw;
}

TEST(SpinBriefly, EndsWhenItHoldsAndWhenItDoesNot) {
  int looks = 0;
  EXPECT_TRUE(SpinBriefly(10, 10, [&] { return ++looks == 5; }));
  EXPECT_EQ(looks, 5);
  EXPECT_TRUE(SpinBriefly(10, 10, [&] { return ++looks == 20; }));
  EXPECT_EQ(looks, 20);
  looks = 0;
  EXPECT_FALSE(SpinBriefly(10, 10, [&] {
    ++looks;
    return false;
  }));
  EXPECT_EQ(looks, 21);
}

// Whatever else runs: a wait that takes long ends up asleep.
TEST(Backoff, SleepsInTheEnd) {
  std::thread([] {
    Backoff backoff(100);
    for (int i = 0; i < 100; ++i) {
      backoff.Pause();
      ASSERT_FALSE(backoff.sleeps());
    }
    const auto began = std::chrono::steady_clock::now();
    while (!backoff.sleeps()) backoff.Pause();
    const int64_t before = Sleeps();
    for (int i = 0; i < 10; ++i) backoff.Pause();
    EXPECT_GE(Sleeps() - before, 10) << "a pause did not sleep";
    EXPECT_GE(std::chrono::steady_clock::now() - began, std::chrono::microseconds(200 + 10 * 20));
  }).join();
}

TEST(Backoff, AsksForShortTurns) {
  std::thread([] {
    if (TimeSlice() == 0) GTEST_SKIP() << "this kernel gives no thread a time slice of its own (Linux 6.12 and later)";
    Backoff backoff(0);
    backoff.Pause();
    EXPECT_EQ(TimeSlice(), 100'000u);
    EXPECT_EQ(prctl(PR_GET_TIMERSLACK, 0UL, 0UL, 0UL, 0UL), 1);
  }).join();
}

// Neither the niceness nor the policy that the process was started with changes.
TEST(TakeShortTurns, LeavesPriorityAndPolicy) {
  std::thread([] {
    const auto thread = static_cast<id_t>(gettid());
    ASSERT_EQ(setpriority(PRIO_PROCESS, thread, 7), 0);
    TakeShortTurns();
    EXPECT_EQ(getpriority(PRIO_PROCESS, thread), 7);
    EXPECT_EQ(sched_getscheduler(0), SCHED_OTHER);
  }).join();
  std::thread([] {
    const sched_param none{};
    ASSERT_EQ(sched_setscheduler(0, SCHED_BATCH, &none), 0);
    TakeShortTurns();
    EXPECT_EQ(sched_getscheduler(0), SCHED_BATCH);
  }).join();
}

}  // namespace
}  // namespace weft
