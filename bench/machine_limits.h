#pragma once
// What this machine can do, measured in the same run as whatever is to be judged by it: virtual machines differ by
// factors and change from minute to minute, so only shares of these limits are worth comparing.

#include <string>

#include "weft/core/function_ref.h"
#include "weft/core/thread_pool.h"

namespace weft::bench {

// kThreadCpu counts only the time that the calling thread was on a CPU, for machines that are busy with other work; it
// makes sense for one thread alone.
enum class Clock { kWall, kThreadCpu };

struct Rate {
  double one = 0;  // one thread
  double all = 0;  // every thread of the pool at once
};

struct MachineLimits {
  int threads = 1;
  Rate fma_gflops;    // f32 fused multiply-adds on registers, two FLOP each
  Rate read_gb_s;     // reading memory that is in no cache, one stream a thread; 10^9 bytes
  Rate sgemm_gflops;  // OpenBLAS, serial build, one 768^3 product a thread at a time; 0 where it is not linked in
};

// Takes about two seconds. Each figure is the best of many runs of a few milliseconds, shorter than a time slice, for
// whatever else runs on the machine can only make them smaller.
MachineLimits MeasureMachineLimits(ThreadPool& pool, Clock clock = Clock::kWall);

// A few lines of text for the head of a report.
std::string Describe(const MachineLimits& limits);

struct Timing {
  double median_s = 0;
  double best_s = 0;
};

// Runs `fn` once to warm up, then at least `repeats` times and for at least `seconds`.
Timing Measure(FunctionRef<void()> fn, int repeats = 5, double seconds = 0.2, Clock clock = Clock::kWall);

}  // namespace weft::bench
