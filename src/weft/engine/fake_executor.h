#pragma once
// For tests: an executor whose model is a hash. It checks that every plan fits together with what it has been told.

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#include "weft/core/error.h"
#include "weft/runner/step_plan.h"

namespace weft {

// The pseudo model: the token that follows `tokens`.
inline int32_t NextToken(const std::vector<int32_t>& tokens, int64_t vocab_size) {
  uint64_t hash = 0x9e3779b97f4a7c15u;
  for (const int32_t token : tokens) {
    hash = (hash ^ static_cast<uint64_t>(token)) * 0x100000001b3u;
    hash ^= hash >> 29;
  }
  return static_cast<int32_t>(hash % static_cast<uint64_t>(vocab_size));
}

class FakeExecutor : public StepExecutor {
 public:
  FakeExecutor(int64_t num_blocks, int64_t vocab_size) : num_blocks_(num_blocks), vocab_size_(vocab_size) {}

  StepOutput Execute(const StepPlan& plan) override {
    {
      std::unique_lock lock(mutex_);
      gate_.wait(lock, [&] { return permits_ != 0; });
      if (permits_ > 0) --permits_;
    }
    ++steps_;
    if (before) before(plan);
    for (const RequestHandle handle : plan.released) Must(known_.erase(handle) == 1, "released without being known");
    for (const NewRequest& request : plan.admitted) {
      Must(known_.emplace(request.handle, Known{request.prompt_token_ids, request.params, 0}).second, "told twice");
    }
    StepOutput output;
    for (const RequestStep& step : plan.requests) {
      const auto found = known_.find(step.handle);
      Must(found != known_.end(), "a step of an unknown request");
      Known& known = found->second;
      known.tokens.insert(known.tokens.end(), step.appended_token_ids.begin(), step.appended_token_ids.end());
      if (step.first_block == 0) known.computed = step.computed;  // what the prefix cache had
      const auto length = static_cast<int64_t>(known.tokens.size());
      Must(step.computed == known.computed && step.tokens >= 1, "computed tokens do not go on where they ended");
      known.computed += step.tokens;
      Must(known.computed <= length && step.sample == (known.computed == length), "sampling at the wrong place");
      RowOutput row;
      row.handle = step.handle;
      if (known.params.prompt_logprobs) {
        row.first_prompt_position = step.computed + 1;
        for (int64_t p = step.computed + 1; p <= known.computed && p < length; ++p) {
          row.prompt_logprobs.push_back({{known.tokens[static_cast<size_t>(p)], -static_cast<float>(p), 1}, {}});
        }
      }
      if (step.sample) {
        row.token_id = NextToken(known.tokens, vocab_size_);
        if (known.params.logprobs) row.logprobs = PositionLogprobs{{*row.token_id, -1.5f, 1}, {}};
      }
      output.rows.push_back(std::move(row));
    }
    if (after) after(output);
    return output;
  }
  std::vector<int64_t> ExpertLoad() const override { return {0, 2, 3}; }
  int64_t num_blocks() const override { return num_blocks_; }

  // Steps that may be executed before the next Allow; negative: any number.
  void Allow(int64_t steps) {
    const std::lock_guard lock(mutex_);
    permits_ = steps;
    gate_.notify_all();
  }
  int64_t steps() const { return steps_; }

  std::function<void(const StepPlan&)> before;
  std::function<void(StepOutput&)> after;

 private:
  struct Known {
    std::vector<int32_t> tokens;
    SamplingParams params;
    int64_t computed = 0;
  };
  static void Must(bool condition, const char* rule) {
    if (!condition) throw std::logic_error(rule);
  }

  const int64_t num_blocks_;
  const int64_t vocab_size_;
  std::unordered_map<RequestHandle, Known> known_;
  std::atomic<int64_t> steps_{0};
  std::mutex mutex_;
  std::condition_variable gate_;
  int64_t permits_ = -1;
};

}  // namespace weft
