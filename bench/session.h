#pragma once
// One request after the other on an executor of its own, timed.

#include <algorithm>
#include <chrono>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "weft/cp/layout.h"
#include "weft/model/checkpoint.h"
#include "weft/runner/executor.h"

namespace weft::bench {

using Steady = std::chrono::steady_clock;

inline double Seconds(Steady::time_point since) { return std::chrono::duration<double>(Steady::now() - since).count(); }

inline double Median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

// One request after the other on an executor.
class Session {
 public:
  // `options`: whatever differs from the defaults.
  Session(std::shared_ptr<const Checkpoint> checkpoint, const cp::ParallelConfig& parallel, int threads,
          int64_t max_tokens, ExecutorOptions options = {})
      : config_(checkpoint->config()), layout_(LayoutOf(parallel)) {
    options.parallel = parallel;
    options.threads_per_rank = threads;
    options.num_blocks = layout_.BlocksFor(max_tokens) + 1;
    options.max_model_len = max_tokens;
    options.measure_rates = true;
    executor_ = MakeThreadExecutor(options, std::move(checkpoint));
  }

  // Seconds until the first token of a prompt of n tokens, run in chunks.
  double Prefill(int64_t n, int64_t chunk) {
    Release();
    std::uniform_int_distribution<int32_t> token(0, static_cast<int32_t>(config_.vocab_size - 1));
    NewRequest request;
    request.handle = ++handle_;
    for (int64_t i = 0; i < n; ++i) request.prompt_token_ids.push_back(token(rng_));
    request.params.temperature = 0;
    known_ = n;
    computed_ = 0;
    blocks_ = 0;
    const auto start = Steady::now();
    while (computed_ < n) {
      StepPlan plan;
      plan.released.swap(released_);
      if (computed_ == 0) plan.admitted.push_back(request);
      Run(plan, true, std::min(chunk, n - computed_));
    }
    return Seconds(start);
  }

  // One step of several requests of random tokens, whose earlier tokens are taken to be in the cache (with whatever
  // lies there): its seconds.
  struct Item {
    int64_t computed = 0;
    int64_t tokens = 1;
    bool prefill = true;
  };
  double Step(const std::vector<Item>& items) {
    Release();
    std::uniform_int_distribution<int32_t> token(0, static_cast<int32_t>(config_.vocab_size - 1));
    StepPlan plan;
    plan.released.swap(released_);
    int32_t block = 0;
    for (const Item& item : items) {
      NewRequest request;
      request.handle = ++handle_;
      const int64_t known = item.computed + item.tokens;
      for (int64_t i = 0; i < known; ++i) request.prompt_token_ids.push_back(token(rng_));
      request.params.temperature = 0;
      RequestStep step;
      step.handle = handle_;
      step.computed = item.computed;
      step.tokens = item.tokens;
      step.prefill = item.prefill;
      step.sample = true;
      for (int64_t i = 0; i < layout_.BlocksFor(known); ++i) step.block_ids.push_back(block++);
      if (&item != &items.back()) released_.push_back(handle_);
      plan.admitted.push_back(std::move(request));
      plan.requests.push_back(std::move(step));
    }
    const auto start = Steady::now();
    executor_->Execute(plan);
    return Seconds(start);
  }

  // Median seconds of a decode step after the last Prefill.
  double Decode(int steps) {
    std::vector<double> times;
    for (int i = 0; i < steps; ++i) {
      const auto start = Steady::now();
      StepPlan plan;
      Run(plan, false, 1);
      times.push_back(Seconds(start));
    }
    return Median(times);
  }

 private:
  void Run(StepPlan& plan, bool prefill, int64_t tokens) {
    RequestStep step;
    step.handle = handle_;
    step.computed = computed_;
    step.tokens = tokens;
    step.prefill = prefill;
    step.sample = computed_ + tokens == known_;
    step.appended_token_ids.swap(appended_);
    step.first_block = static_cast<int32_t>(blocks_);
    for (; blocks_ < layout_.BlocksFor(computed_ + tokens); ++blocks_) {
      step.block_ids.push_back(static_cast<int32_t>(blocks_));
    }
    plan.requests.push_back(std::move(step));
    const StepOutput output = executor_->Execute(plan);
    computed_ += tokens;
    if (output.rows.at(0).token_id) {
      appended_ = {*output.rows[0].token_id};
      ++known_;
    }
  }
  void Release() {
    if (handle_ != 0) released_.push_back(handle_);
    appended_.clear();
  }

  ModelConfig config_;
  cp::KvLayout layout_;
  std::unique_ptr<StepExecutor> executor_;
  std::mt19937_64 rng_{1};
  RequestHandle handle_ = 0;
  std::vector<RequestHandle> released_;
  std::vector<int32_t> appended_;
  int64_t known_ = 0;
  int64_t computed_ = 0;
  int64_t blocks_ = 0;
};

}  // namespace weft::bench
