#pragma once
// Short waits for another thread.

#include <sched.h>

namespace weft {

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

}  // namespace weft
