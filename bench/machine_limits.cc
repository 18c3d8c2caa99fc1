#include "machine_limits.h"

#include <fmt/format.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <vector>

#include "weft/core/buffer.h"
#include "weft/kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "machine_limits.cc"
#include "hwy/foreach_target.h"
//
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace weft::bench {
namespace HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

// FLOP done by `rounds` rounds of independent multiply-adds. 12 chains hide a latency of 4 to 5 cycles at two a cycle.
double FmaRounds(int64_t rounds, float seed, float* sink) {
  const hn::ScalableTag<float> d;
  constexpr int kChains = 12;
  hn::Vec<decltype(d)> acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = hn::Set(d, static_cast<float>(i));
  const auto a = hn::Set(d, seed);
  const auto b = hn::Set(d, 1.0f - seed);
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) acc[i] = hn::MulAdd(acc[i], a, b);
  }
  auto sum = acc[0];
  for (int i = 1; i < kChains; ++i) sum = hn::Add(sum, acc[i]);
  *sink = hn::GetLane(hn::SumOfLanes(d, sum));
  return 2.0 * kChains * static_cast<double>(rounds) * static_cast<double>(hn::Lanes(d));
}

uint64_t ReadBytes(const char* from, size_t bytes) {
  const hn::ScalableTag<uint32_t> d;
  const size_t lanes = hn::Lanes(d);
  constexpr size_t kChains = 8;
  hn::Vec<decltype(d)> acc[kChains];
  for (size_t i = 0; i < kChains; ++i) acc[i] = hn::Zero(d);
  const uint32_t* words = reinterpret_cast<const uint32_t*>(from);
  for (size_t i = 0; i + kChains * lanes <= bytes / 4; i += kChains * lanes) {
#pragma GCC unroll 8
    for (size_t c = 0; c < kChains; ++c) acc[c] = hn::Or(acc[c], hn::LoadU(d, words + i + c * lanes));
  }
  for (size_t i = 1; i < kChains; ++i) acc[0] = hn::Or(acc[0], acc[i]);
  return hn::GetLane(acc[0]);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace weft::bench
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

#ifdef WEFT_HAVE_SGEMM
extern "C" void cblas_sgemm(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha,
                            const float* a, int lda, const float* b, int ldb, float beta, float* c, int ldc);
#endif

namespace weft::bench {
namespace {

HWY_EXPORT(FmaRounds);
HWY_EXPORT(ReadBytes);

double Seconds(Clock clock) {
  if (clock == Clock::kThreadCpu) {
    timespec now{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Work per second when `threads` threads of the pool call work(thread) once: the best of several tries.
double BestRate(ThreadPool& pool, Clock clock, int threads, FunctionRef<double(int thread)> work) {
  constexpr int kTries = 24;
  double best = 0;
  std::vector<double> done(static_cast<size_t>(threads));
  for (int i = 0; i < kTries; ++i) {
    const double start = Seconds(clock);
    if (threads == 1) {
      done[0] = work(0);
    } else {
      pool.RunOnAll([&](int thread) { done[static_cast<size_t>(thread)] = work(thread); });
    }
    const double elapsed = Seconds(clock) - start;
    double total = 0;
    for (const double d : done) total += d;
    best = std::max(best, total / elapsed);
  }
  return best;
}

Rate MeasureRate(ThreadPool& pool, Clock clock, FunctionRef<double(int thread)> work) {
  Rate rate;
  rate.one = BestRate(pool, clock, 1, work) * 1e-9;
  rate.all = pool.size() == 1 ? rate.one : BestRate(pool, clock, pool.size(), work) * 1e-9;
  return rate;
}

}  // namespace

MachineLimits MeasureMachineLimits(ThreadPool& pool, Clock clock) {
  MachineLimits limits;
  limits.threads = pool.size();
  std::atomic<float> sink{0};
  std::atomic<uint64_t> word{0};

  limits.fma_gflops = MeasureRate(pool, clock, [&](int) {
    float value = 0;
    const double flop = HWY_DYNAMIC_DISPATCH(FmaRounds)(500'000, 0.999f, &value);
    sink.store(value, std::memory_order_relaxed);
    return flop;
  });

  // Much more than any L3 that the threads may have to themselves.
  constexpr size_t kBytesPerThread = size_t{256} << 20;
  Buffer memory(kBytesPerThread * static_cast<size_t>(pool.size()));
  pool.RunOnAll([&](int thread) {
    std::memset(memory.as<char>() + kBytesPerThread * static_cast<size_t>(thread), 1, kBytesPerThread);
  });
  // A piece at a time, round and round: what was read before has left the caches when its turn comes again.
  constexpr size_t kPiece = size_t{32} << 20;
  std::vector<size_t> next(static_cast<size_t>(pool.size()) * 16);  // a cache line a thread
  limits.read_gb_s = MeasureRate(pool, clock, [&](int thread) {
    size_t& offset = next[static_cast<size_t>(thread) * 16];
    const char* from = memory.as<char>() + kBytesPerThread * static_cast<size_t>(thread) + offset;
    offset = (offset + kPiece) % kBytesPerThread;
    word.store(HWY_DYNAMIC_DISPATCH(ReadBytes)(from, kPiece), std::memory_order_relaxed);
    return static_cast<double>(kPiece);
  });

#ifdef WEFT_HAVE_SGEMM
  constexpr int kSize = 768;
  constexpr int64_t kElements = int64_t{kSize} * kSize;
  Buffer matrices(static_cast<size_t>(3 * kElements * pool.size()) * sizeof(float));
  std::fill_n(matrices.as<float>(), 3 * kElements * pool.size(), 0.5f);
  limits.sgemm_gflops = MeasureRate(pool, clock, [&](int thread) {
    float* a = matrices.as<float>() + 3 * kElements * thread;
    constexpr int kRowMajor = 101;
    constexpr int kNoTranspose = 111;
    cblas_sgemm(kRowMajor, kNoTranspose, kNoTranspose, kSize, kSize, kSize, 1.0f, a, kSize, a + kElements, kSize, 0.0f,
                a + 2 * kElements, kSize);
    return 2.0 * kElements * kSize;
  });
#endif
  return limits;
}

std::string Describe(const MachineLimits& limits) {
  auto line = [&](const char* what, const Rate& rate, const char* unit) {
    return fmt::format("  {:<28} {:8.1f} {:8.1f}  {}\n", what, rate.one, rate.all, unit);
  };
  const int64_t usable = hwy::SupportedTargets() & HWY_TARGETS;
  const int64_t best = usable & -usable;  // lower bits are better targets
  std::string text = fmt::format("machine ({}):{:>22} thread {} threads\n", hwy::TargetName(best), "1", limits.threads);
  text += line("f32 FMA", limits.fma_gflops, "GFLOP/s");
  text += line("memory read", limits.read_gb_s, "GB/s");
  if (limits.sgemm_gflops.one > 0) {
    text += line("OpenBLAS sgemm 768^3", limits.sgemm_gflops, "GFLOP/s");
    text += fmt::format("  {:<28} {:7.1f}% {:7.1f}%\n", "  share of FMA",
                        100 * limits.sgemm_gflops.one / limits.fma_gflops.one,
                        100 * limits.sgemm_gflops.all / limits.fma_gflops.all);
  }
  return text;
}

Timing Measure(FunctionRef<void()> fn, int repeats, double seconds, Clock clock) {
  fn();
  std::vector<double> times;
  const double start = Seconds(clock);
  double now = start;
  while (static_cast<int>(times.size()) < repeats || now - start < seconds) {
    const double begin = Seconds(clock);
    fn();
    now = Seconds(clock);
    times.push_back(now - begin);
  }
  std::sort(times.begin(), times.end());
  return {.median_s = times[times.size() / 2], .best_s = times.front()};
}

}  // namespace weft::bench
#endif  // HWY_ONCE
