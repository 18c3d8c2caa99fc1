#include "weft/core/thread_pool.h"

#include <sched.h>

#include <algorithm>

#include "weft/core/error.h"
#include "weft/core/wait.h"

namespace weft {
void AllowThisThread(const std::vector<int>& cpus) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int cpu : cpus) CPU_SET(cpu, &set);
  (void)sched_setaffinity(0, sizeof(set), &set);
}

void PinThisThread(int cpu) { AllowThisThread({cpu}); }

std::vector<int> AllowedCpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  }
  return cpus;
}

ThreadPool::ThreadPool(int threads, const std::vector<int>& cpus) : shared_(std::make_unique<Shared>()) {
  WEFT_CHECK(threads >= 1, "threads = {}", threads);
  auto cpu_of = [&](int thread) { return cpus.empty() ? -1 : cpus[static_cast<size_t>(thread) % cpus.size()]; };
  if (!cpus.empty()) {
    caller_cpus_ = AllowedCpus();
    PinThisThread(cpu_of(0));
  }
  workers_.reserve(static_cast<size_t>(threads - 1));
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i, cpu = cpu_of(i)] { Work(i, cpu); });
}

ThreadPool::~ThreadPool() {
  shared_->stop.store(true, std::memory_order_relaxed);
  shared_->generation.fetch_add(1, std::memory_order_release);
  shared_->generation.notify_all();
  for (std::thread& worker : workers_) worker.join();
  if (!caller_cpus_.empty()) AllowThisThread(caller_cpus_);
}

void ThreadPool::Work(int thread, int cpu) {
  if (cpu >= 0) PinThisThread(cpu);
  TakeShortTurns();
  uint32_t seen = 0;
  while (true) {
    seen = WaitWhile(shared_->generation, seen, kSpins);
    if (shared_->stop.load(std::memory_order_relaxed)) return;
    (*shared_->task)(thread);
    shared_->running.fetch_sub(1, std::memory_order_release);
  }
}

void ThreadPool::RunOnAll(FunctionRef<void(int)> fn) {
  if (workers_.empty()) {
    fn(0);
    return;
  }
  shared_->task = &fn;
  shared_->running.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  shared_->generation.fetch_add(1, std::memory_order_release);
  shared_->generation.notify_all();
  fn(0);
  Backoff backoff(kSpins);
  while (shared_->running.load(std::memory_order_acquire) != 0) backoff.Pause();
}

void ThreadPool::ParallelFor(int64_t n, int64_t grain, FunctionRef<void(int64_t, int64_t, int)> fn) {
  WEFT_CHECK(grain >= 1);
  if (n <= 0) return;
  if (workers_.empty() || n <= grain) {
    fn(0, n, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  RunOnAll([&](int thread) {
    while (true) {
      const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= n) return;
      fn(begin, std::min(begin + grain, n), thread);
    }
  });
}

}  // namespace weft
