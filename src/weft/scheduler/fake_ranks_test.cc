#include "weft/scheduler/fake_ranks_test.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

namespace weft {

FakeRanks::FakeRanks(const Limits& limits)
    : limits_(limits), memory_(static_cast<size_t>(limits.num_blocks * limits.virtual_block_tokens)) {}

int32_t FakeRanks::NextToken(const std::vector<int32_t>& tokens) {
  uint64_t hash = 14695981039346656037u;
  for (const int32_t token : tokens) hash = (hash ^ static_cast<uint32_t>(token)) * 1099511628211u;
  return static_cast<int32_t>(hash >> 40);
}

void FakeRanks::Wrong(const StepPlan& plan, RequestHandle handle, const std::string& what) {
  if (problem_.empty()) problem_ = fmt::format("step {}, request {}: {}\n{}", plan.step, handle, what, Dump(plan));
}

FakeRanks::Slot& FakeRanks::SlotOf(const Live& live, int64_t position) {
  const auto block = static_cast<size_t>(live.blocks[static_cast<size_t>(position / limits_.virtual_block_tokens)]);
  return memory_[block * static_cast<size_t>(limits_.virtual_block_tokens) +
                 static_cast<size_t>(position % limits_.virtual_block_tokens)];
}

StepOutput FakeRanks::Execute(const StepPlan& plan) {
  StepOutput output;
  Begin(plan);
  std::set<int32_t> used;
  for (const RequestStep& step : plan.requests) {
    if (!problem_.empty()) return output;
    Apply(plan, step, used);
  }
  for (const RequestStep& step : plan.requests) {
    if (!problem_.empty()) return output;
    output.rows.push_back(Run(plan, step));
  }
  return output;
}

void FakeRanks::Begin(const StepPlan& plan) {
  if (plan.step != next_step_++) Wrong(plan, 0, "steps are not counted 0, 1, ...");
  for (const RequestHandle handle : plan.released) {
    if (live_.erase(handle) == 0) Wrong(plan, handle, "released but not known");
  }
  for (const NewRequest& request : plan.admitted) {
    const auto [entry, inserted] = live_.emplace(request.handle, Live{.request = request, .tokens = {}, .blocks = {}});
    if (!inserted) Wrong(plan, request.handle, "admitted twice");
    entry->second.tokens = request.prompt_token_ids;
  }
  int64_t tokens = 0;
  std::set<RequestHandle> handles;
  for (const RequestStep& step : plan.requests) {
    tokens += step.tokens;
    if (!handles.insert(step.handle).second) Wrong(plan, step.handle, "two rows");
    if (!live_.contains(step.handle)) Wrong(plan, step.handle, "not known");
  }
  for (const NewRequest& request : plan.admitted) {
    if (!handles.contains(request.handle)) Wrong(plan, request.handle, "admitted without a row");
  }
  if (tokens > limits_.max_num_batched_tokens) Wrong(plan, 0, "over the budget of tokens");
  if (static_cast<int64_t>(handles.size()) > limits_.max_num_seqs) Wrong(plan, 0, "over max_num_seqs");
}

void FakeRanks::Apply(const StepPlan& plan, const RequestStep& step, std::set<int32_t>& used) {
  Live& live = live_.at(step.handle);
  live.tokens.insert(live.tokens.end(), step.appended_token_ids.begin(), step.appended_token_ids.end());
  const auto known = static_cast<int64_t>(live.tokens.size());

  if (step.first_block < 0 || static_cast<size_t>(step.first_block) > live.blocks.size()) {
    return Wrong(plan, step.handle, fmt::format("first_block leaves a gap after {} blocks", live.blocks.size()));
  }
  live.blocks.resize(static_cast<size_t>(step.first_block));
  live.blocks.insert(live.blocks.end(), step.block_ids.begin(), step.block_ids.end());
  if (step.first_block == 0) {
    live.computed = 0;
    live.prefill_until = known;
    ++live.lives;
  }
  if (step.tokens < 1) return Wrong(plan, step.handle, "no token");
  if (step.computed != live.computed) {
    return Wrong(plan, step.handle, fmt::format("{} tokens are computed", live.computed));
  }
  const int64_t end = step.computed + step.tokens;
  if (end > known) return Wrong(plan, step.handle, fmt::format("only {} tokens are known", known));
  if (end > static_cast<int64_t>(live.blocks.size()) * limits_.virtual_block_tokens) {
    return Wrong(plan, step.handle, "the table does not cover the tokens");
  }
  for (const int32_t block : live.blocks) {
    if (block < 0 || block >= limits_.num_blocks) return Wrong(plan, step.handle, "block out of range");
    if (!used.insert(block).second) return Wrong(plan, step.handle, fmt::format("block {} is shared", block));
  }
  const bool prefill = live.computed < live.prefill_until;
  if (step.prefill != prefill) return Wrong(plan, step.handle, "wrong prefill flag");
  if (!prefill && step.tokens != 1) return Wrong(plan, step.handle, "a decode row of several tokens");
  if (step.sample != (end == known)) return Wrong(plan, step.handle, "wrong sample flag");
  if (prefill && !limits_.chunked_prefill && (step.computed != 0 || !step.sample)) {
    return Wrong(plan, step.handle, "a chunk, though chunks are off");
  }
}

RowOutput FakeRanks::Run(const StepPlan& plan, const RequestStep& step) {
  Live& live = live_.at(step.handle);
  RowOutput row;
  row.handle = step.handle;
  const int64_t end = step.computed + step.tokens;
  for (int64_t p = step.computed; p < end; ++p) {
    SlotOf(live, p) = {.handle = step.handle, .position = p, .token = live.tokens[static_cast<size_t>(p)]};
  }
  live.computed = end;
  // A query at `end` - 1 sees the whole context.
  std::vector<int32_t> context;
  for (int64_t p = 0; p < end; ++p) {
    const Slot& slot = SlotOf(live, p);
    if (slot.handle != step.handle || slot.position != p || slot.token != live.tokens[static_cast<size_t>(p)]) {
      Wrong(plan, step.handle,
            fmt::format("the slot of position {} holds request {}, position {}, token {}", p, slot.handle,
                        slot.position, slot.token));
      return row;
    }
    context.push_back(slot.token);
  }
  if (step.sample) row.token_id = NextToken(context);
  if (step.sample && live.request.params.logprobs) row.logprobs = PositionLogprobs{{*row.token_id, -1.0f, 1}, {}};
  if (live.request.params.prompt_logprobs) {
    const auto prompt = static_cast<int64_t>(live.request.prompt_token_ids.size());
    row.first_prompt_position = step.computed + 1;
    for (int64_t p = step.computed + 1; p <= std::min(end, prompt - 1); ++p) {
      row.prompt_logprobs.push_back({{live.tokens[static_cast<size_t>(p)], -static_cast<float>(p), 1}, {}});
    }
  }
  return row;
}

std::string Dump(const StepPlan& plan) {
  std::string text = fmt::format("step {} released {}\n", plan.step, plan.released);
  for (const NewRequest& r : plan.admitted) text += fmt::format("  admitted {} {}\n", r.handle, r.prompt_token_ids);
  for (const RequestStep& s : plan.requests) {
    text += fmt::format("  {}: {}+{}{}{} appended {} blocks from {}: {}\n", s.handle, s.computed, s.tokens,
                        s.prefill ? " prefill" : "", s.sample ? " sample" : "", s.appended_token_ids, s.first_block,
                        s.block_ids);
  }
  return text;
}

}  // namespace weft
