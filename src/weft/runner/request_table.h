#pragma once
// What the ranks of one process know of the live requests. Built from StepPlans alone, so that every process has the
// same; shared, read-only during a step, by all rank threads.

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "weft/runner/step_plan.h"

namespace weft {

struct RequestState {
  std::vector<int32_t> tokens;  // prompt, then output
  int64_t prompt_tokens = 0;
  SamplingParams params;
  uint64_t seed = 0;                 // params.seed, or one derived from the engine's
  std::vector<int32_t> block_table;  // virtual blocks
};

class RequestTable {
 public:
  explicit RequestTable(uint64_t seed) : seed_(seed) {}

  // Takes in a plan's news, before the step runs.
  void Apply(const StepPlan& plan);
  const RequestState& Get(RequestHandle handle) const;
  size_t size() const { return requests_.size(); }

 private:
  uint64_t seed_;
  std::unordered_map<RequestHandle, RequestState> requests_;
};

}  // namespace weft
