#pragma once
// A rank's own compute threads.

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "weft/core/function_ref.h"

namespace weft {

// A few threads that run one function together, many thousand times a second: the caller is thread 0, the others spin
// for a while after a task and then sleep. Not for concurrent callers: one rank, one pool.
class ThreadPool {
 public:
  // `threads` >= 1 counts the caller. `cpus`: CPU numbers to pin threads 0, 1, ... to (the caller too); empty: no
  // pinning.
  explicit ThreadPool(int threads, const std::vector<int>& cpus = {});
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Runs fn(thread) on every thread and returns when all have returned. fn must not throw.
  void RunOnAll(FunctionRef<void(int thread)> fn);

  // Cuts [0, n) into pieces of `grain` (the last is shorter) which the threads take one after another.
  // fn(begin, end, thread) must not throw.
  void ParallelFor(int64_t n, int64_t grain, FunctionRef<void(int64_t begin, int64_t end, int thread)> fn);

 private:
  void Work(int thread, int cpu);

  struct alignas(64) Shared {
    std::atomic<uint32_t> generation{0};  // raised once a task; the workers wait for it
    std::atomic<int> running{0};          // workers still in the task
    std::atomic<bool> stop{false};
    const FunctionRef<void(int)>* task = nullptr;
  };
  std::unique_ptr<Shared> shared_;
  std::vector<std::thread> workers_;
  std::vector<int> caller_cpus_;  // what the caller was allowed before it was pinned
};

// Pins the calling thread; does nothing where the CPU does not exist for this process.
void PinThisThread(int cpu);

// Lets the calling thread run on these CPUs and no others.
void AllowThisThread(const std::vector<int>& cpus);

// The CPUs that this process may run on, ascending.
std::vector<int> AllowedCpus();

}  // namespace weft
