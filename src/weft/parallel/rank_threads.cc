#include "weft/parallel/rank_threads.h"

#include <pthread.h>

#include <utility>

#include "weft/core/error.h"
#include "weft/core/thread_pool.h"
#include "weft/core/wait.h"

namespace weft {
namespace {

// With no core to spare for whoever waits, it does not spin.
int SpinsFor(int threads) { return static_cast<size_t>(threads) > AllowedCpus().size() ? 0 : kSpins; }

}  // namespace

RankThreads::RankThreads(int ranks, std::function<void()> on_error)
    : on_error_(std::move(on_error)), spins_(SpinsFor(ranks)) {
  WEFT_CHECK(ranks >= 1, "ranks = {}", ranks);
  threads_.reserve(static_cast<size_t>(ranks));
  for (int rank = 0; rank < ranks; ++rank) {
    threads_.emplace_back([this, rank] {
      // Shown by top -H, gdb and perf; 15 characters at most.
      pthread_setname_np(pthread_self(), fmt::format("weft-rank-{}", rank % 10000).c_str());
      Work(rank);
    });
  }
}

RankThreads::~RankThreads() {
  shared_.stop = true;
  shared_.generation.fetch_add(1, std::memory_order_release);
  shared_.generation.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void RankThreads::Work(int rank) {
  TakeShortTurns();
  uint32_t seen = 0;
  while (true) {
    seen = WaitWhile(shared_.generation, seen, spins_);
    if (shared_.stop) return;
    try {
      (*shared_.task)(rank);
    } catch (...) {
      {
        const std::lock_guard lock(mutex_);
        if (!first_error_) first_error_ = std::current_exception();
      }
      if (on_error_) on_error_();
    }
    if (shared_.running.fetch_sub(1, std::memory_order_acq_rel) == 1) shared_.running.notify_all();
  }
}

void RankThreads::RunOnAll(FunctionRef<void(int)> fn) {
  shared_.task = &fn;
  shared_.running.store(size(), std::memory_order_relaxed);
  shared_.generation.fetch_add(1, std::memory_order_release);
  shared_.generation.notify_all();
  for (int left = size(); left != 0;) left = WaitWhile(shared_.running, left, 0);
  if (const std::exception_ptr error = std::exchange(first_error_, nullptr)) std::rethrow_exception(error);
}

}  // namespace weft
