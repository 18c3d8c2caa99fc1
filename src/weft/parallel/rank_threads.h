#pragma once
// The threads that ranks live on when they share a process.

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "weft/core/function_ref.h"

namespace weft {

// `ranks` threads that run one function together, again and again, and live as long as the object: what a rank pins,
// allocates first or keeps thread-local stays with its thread. Between two runs they spin for some microseconds and
// then sleep. Not for concurrent callers.
class RankThreads {
 public:
  // `on_error` is called on a rank's thread as soon as its function has thrown, while the others may still be waiting
  // for that rank: it has to make them give up (AbortAll of the groups). It may be called by several ranks at once.
  explicit RankThreads(int ranks, std::function<void()> on_error = {});
  ~RankThreads();
  RankThreads(const RankThreads&) = delete;
  RankThreads& operator=(const RankThreads&) = delete;

  int size() const { return static_cast<int>(threads_.size()); }

  // Runs fn(rank) on every rank's thread and returns when all have returned. When ranks threw, the exception that was
  // thrown first (in time: the others are mostly its consequences) is thrown here.
  void RunOnAll(FunctionRef<void(int rank)> fn);

 private:
  void Work(int rank);

  struct alignas(64) Shared {
    std::atomic<uint32_t> generation{0};  // raised once a run; the threads wait for it
    bool stop = false;                    // published by generation, like task
    const FunctionRef<void(int)>* task = nullptr;
    alignas(64) std::atomic<int> running{0};  // threads still in the run
  };
  Shared shared_;
  std::function<void()> on_error_;
  int spins_;
  std::mutex mutex_;
  std::exception_ptr first_error_;  // under mutex_
  std::vector<std::thread> threads_;
};

}  // namespace weft
