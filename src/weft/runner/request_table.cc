#include "weft/runner/request_table.h"

#include "weft/core/error.h"
#include "weft/runner/random.h"

namespace weft {

void RequestTable::Apply(const StepPlan& plan) {
  for (const RequestHandle handle : plan.released) requests_.erase(handle);
  for (const NewRequest& request : plan.admitted) {
    RequestState state;
    state.tokens = request.prompt_token_ids;
    state.prompt_tokens = static_cast<int64_t>(state.tokens.size());
    state.params = request.params;
    state.seed = request.params.seed ? *request.params.seed : MixBits(seed_ ^ MixBits(request.handle));
    const bool fresh = requests_.emplace(request.handle, std::move(state)).second;
    WEFT_CHECK(fresh, "request {} admitted twice", request.handle);
  }
  for (const RequestStep& step : plan.requests) {
    const auto it = requests_.find(step.handle);
    WEFT_CHECK(it != requests_.end(), "request {} was never admitted", step.handle);
    RequestState& state = it->second;
    state.tokens.insert(state.tokens.end(), step.appended_token_ids.begin(), step.appended_token_ids.end());
    WEFT_CHECK(step.first_block >= 0 && static_cast<size_t>(step.first_block) <= state.block_table.size());
    state.block_table.resize(static_cast<size_t>(step.first_block));
    state.block_table.insert(state.block_table.end(), step.block_ids.begin(), step.block_ids.end());
    const auto known = static_cast<int64_t>(state.tokens.size());
    WEFT_CHECK(step.tokens >= 1 && step.computed + step.tokens <= known, "request {}: {} + {} of {} tokens",
               step.handle, step.computed, step.tokens, known);
    WEFT_CHECK(!step.sample || step.computed + step.tokens == known);
    WEFT_CHECK(step.prefill || (step.tokens == 1 && step.sample), "a decode row is one token");
  }
}

const RequestState& RequestTable::Get(RequestHandle handle) const {
  const auto it = requests_.find(handle);
  WEFT_CHECK(it != requests_.end(), "request {} is not known", handle);
  return it->second;
}

}  // namespace weft
