#pragma once
// Waits for another thread.

#include <sched.h>

#include <atomic>
#include <chrono>

namespace weft {

// About 20 us of CpuRelax(): longer than the gap between two kernels of a layer, what the engine does between two
// steps, and what ranks with the same work to do are apart; shorter than a scheduler's time slice.
inline constexpr int kSpins = 2000;

// Tells the core that this is a wait loop.
inline void CpuRelax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Polls `done` with `spins` pauses and then `yields` yields of the core in between; true as soon as it holds, false
// when it still does not after all of them (the caller then goes on in some other way).
template <typename Done>
bool SpinBriefly(int spins, int yields, Done done) {
  for (int i = 0; i < spins; ++i) {
    if (done()) return true;
    CpuRelax();
  }
  for (int i = 0; i < yields; ++i) {
    if (done()) return true;
    sched_yield();
  }
  return done();
}

// Waits until `value` is no longer `old` and returns what it is then. For a value whose writer calls notify_all: the
// thread sleeps after `spins` pauses and some yields, by which threads that share a core let each other go on.
template <typename T>
T WaitWhile(const std::atomic<T>& value, T old, int spins) {
  SpinBriefly(spins, 50, [&] { return value.load(std::memory_order_acquire) != old; });
  T now;
  while ((now = value.load(std::memory_order_acquire)) == old) value.wait(old, std::memory_order_acquire);
  return now;
}

// Asks for the calling thread to be scheduled in turns of 0.1 ms (a slice of its own: Linux 6.12 and later; nothing
// changes elsewhere, nor how much of the core it gets). Threads that wait for each other need it wherever they share a
// core with anything else: with the usual turns of 3 ms one that has been waited for gets the core when the turn of the
// other is over, not when it wakes, and one that yields is moved back by a whole turn of its own. A step of 5 ms took
// up to 29 s beside one busy process (6.18, 8 ranks in two processes on 2 cores).
void TakeShortTurns();

// The pauses between the looks of one wait that may be short or long, for something that nobody wakes a thread for:
// first the core is kept, then it is yielded, and when that takes long the thread sleeps, an eighth of the time that it
// has waited, so that it stands in nobody's way.
class Backoff {
 public:
  // `spins`: looks without giving up the core.
  explicit Backoff(int spins) : spins_left_(spins) {}

  void Pause() {
    if (spins_left_ > 0) {
      --spins_left_;
      CpuRelax();
    } else {
      GiveUpCore();
    }
  }
  // The pauses have become sleeps, so that there is time between two looks for whatever else is to be looked after.
  bool sleeps() const { return sleeps_; }

 private:
  using Clock = std::chrono::steady_clock;
  void GiveUpCore();

  int spins_left_;
  bool sleeps_ = false;
  Clock::time_point began_{};  // to give up the core
};

}  // namespace weft
