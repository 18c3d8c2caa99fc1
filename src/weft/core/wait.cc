#include "weft/core/wait.h"

#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <thread>
#include <utility>

namespace weft {
namespace {

using std::chrono::microseconds;

// What ranks with the same work are apart when nothing else runs. After that the delay of a sleep is lost in the wait.
constexpr microseconds kYieldFor{200};
// A thread that wakes up costs some 10 us of a core.
constexpr microseconds kShortestSleep{20};
// A socket's buffer holds a few MB, so who looks this often keeps up with several GB/s.
constexpr microseconds kLongestSleep{200};
// The shortest that Linux takes.
constexpr uint64_t kTurnNs = 100'000;

// struct sched_attr of linux/sched/types.h, which does not go together with <sched.h> on Debian 12.
struct SchedAttr {
  uint32_t size = sizeof(SchedAttr);
  uint32_t policy = 0;
  uint64_t flags = 0;
  int32_t nice = 0;
  uint32_t priority = 0;
  uint64_t runtime = 0;
  uint64_t deadline = 0;
  uint64_t period = 0;
};

}  // namespace

void TakeShortTurns() {
  thread_local bool taken = false;
  if (std::exchange(taken, true)) return;
  // The kernel adds 50 us to every sleep of a thread that has not said that it wants to be woken in time.
  prctl(PR_SET_TIMERSLACK, 1UL, 0UL, 0UL, 0UL);
  SchedAttr attr;
  if (syscall(SYS_sched_getattr, 0, &attr, sizeof(attr), 0) != 0 || attr.policy != SCHED_OTHER) return;
  attr.size = sizeof(attr);
  attr.runtime = kTurnNs;
  syscall(SYS_sched_setattr, 0, &attr, 0);
}

void Backoff::GiveUpCore() {
  const Clock::time_point now = Clock::now();
  if (began_ == Clock::time_point{}) {
    began_ = now;
    TakeShortTurns();
  }
  const auto waited = std::chrono::duration_cast<microseconds>(now - began_);
  if (waited < kYieldFor) {
    sched_yield();
  } else {
    sleeps_ = true;
    std::this_thread::sleep_for(std::clamp(waited / 8, kShortestSleep, kLongestSleep));
  }
}

}  // namespace weft
