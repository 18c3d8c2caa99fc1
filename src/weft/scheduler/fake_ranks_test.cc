#include "weft/scheduler/fake_ranks_test.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

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
  Users users;
  for (const RequestStep& step : plan.requests) {
    if (!problem_.empty()) return output;
    Apply(plan, step, users);
  }
  for (const RequestStep& step : plan.requests) {
    if (!problem_.empty()) return output;
    Copy(plan, step, users);
  }
  for (const RequestStep& step : plan.requests) {
    if (!problem_.empty()) return output;
    output.rows.push_back(Run(plan, step, users));
  }
  return output;
}

void FakeRanks::Begin(const StepPlan& plan) {
  if (plan.step != next_step_++) Wrong(plan, 0, "steps are not counted 0, 1, ...");
  for (const RequestHandle handle : plan.released) {
    if (live_.erase(handle) == 0) Wrong(plan, handle, "released but not known");
  }
  for (const NewRequest& request : plan.admitted) {
    const auto [entry, inserted] =
        live_.emplace(request.handle, Live{.request = request, .tokens = {}, .blocks = {}, .history = {}});
    if (!inserted) Wrong(plan, request.handle, "admitted twice");
    entry->second.tokens = request.prompt_token_ids;
    entry->second.salt = salts_[request.handle];
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

void FakeRanks::Apply(const StepPlan& plan, const RequestStep& step, Users& users) {
  Live& live = live_.at(step.handle);
  live.tokens.insert(live.tokens.end(), step.appended_token_ids.begin(), step.appended_token_ids.end());
  const auto known = static_cast<int64_t>(live.tokens.size());

  if (step.first_block < 0 || static_cast<size_t>(step.first_block) > live.blocks.size()) {
    return Wrong(plan, step.handle, fmt::format("first_block leaves a gap after {} blocks", live.blocks.size()));
  }
  live.blocks.resize(static_cast<size_t>(step.first_block));
  live.blocks.insert(live.blocks.end(), step.block_ids.begin(), step.block_ids.end());
  for (auto p = static_cast<int64_t>(live.history.size()); p < known; ++p) {
    const uint64_t before = p == 0 ? live.salt ^ 14695981039346656037u : live.history.back();
    live.history.push_back((before ^ static_cast<uint32_t>(live.tokens[static_cast<size_t>(p)]) ^ before >> 31) *
                           0x9e3779b97f4a7c15u);
  }
  if (step.first_block == 0) {
    if (!limits_.prefix_caching && step.computed != 0) Wrong(plan, step.handle, "a hit without prefix caching");
    live.computed = live.first_computed = step.computed;  // whether all that is there, Run sees
    live.prefill_until = known;
    reused_tokens_ += step.computed;
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
    if (!users[block].insert(step.handle).second) {
      return Wrong(plan, step.handle, fmt::format("block {} has two places in the table", block));
    }
  }
  const bool prefill = live.computed < live.prefill_until;
  if (step.prefill != prefill) return Wrong(plan, step.handle, "wrong prefill flag");
  if (!prefill && step.tokens != 1) return Wrong(plan, step.handle, "a decode row of several tokens");
  if (step.sample != (end == known)) return Wrong(plan, step.handle, "wrong sample flag");
  if (prefill && !limits_.chunked_prefill && (step.computed != live.first_computed || !step.sample)) {
    return Wrong(plan, step.handle, "a chunk, though chunks are off");
  }
}

bool FakeRanks::Mine(const StepPlan& plan, RequestHandle handle, int32_t block, int64_t offset, const Users& users) {
  if (users.at(block).size() != 1) {
    Wrong(plan, handle, fmt::format("writes to block {}, which others use", block));
    return false;
  }
  for (const RequestStep& step : plan.requests) {
    for (const BlockCopy& copy : step.copies) {
      if (copy.source != block || offset >= copy.tokens) continue;
      Wrong(plan, handle, fmt::format("writes to block {}, from which request {} copies", block, step.handle));
      return false;
    }
  }
  return true;
}

void FakeRanks::Copy(const StepPlan& plan, const RequestStep& step, const Users& users) {
  const Live& live = live_.at(step.handle);
  const int64_t whole = limits_.virtual_block_tokens;
  for (const BlockCopy& copy : step.copies) {
    if (!step.prefill || step.first_block != 0) return Wrong(plan, step.handle, "a copy in the middle of a life");
    if (copy.source < 0 || copy.source >= limits_.num_blocks) return Wrong(plan, step.handle, "no such source");
    if (copy.tokens < 1 || copy.tokens > whole) return Wrong(plan, step.handle, "wrong count of a copy");
    // It ends where the computing begins.
    const auto place = static_cast<size_t>((step.computed - 1) / whole);
    if (live.blocks[place] != copy.destination || (step.computed - 1) % whole + 1 != copy.tokens) {
      return Wrong(plan, step.handle, "a copy to where it is not wanted");
    }
    if (!Mine(plan, step.handle, copy.destination, 0, users)) return;
    // What is behind the copied tokens is anything.
    std::fill_n(SlotsOf(copy.destination), whole, Slot{});
    std::copy_n(SlotsOf(copy.source), copy.tokens, SlotsOf(copy.destination));
    copied_tokens_ += copy.tokens;
  }
}

RowOutput FakeRanks::Run(const StepPlan& plan, const RequestStep& step, const Users& users) {
  Live& live = live_.at(step.handle);
  RowOutput row;
  row.handle = step.handle;
  const int64_t end = step.computed + step.tokens;
  for (int64_t p = step.computed; p < end; ++p) {
    const auto i = static_cast<size_t>(p);
    const int32_t block = live.blocks[static_cast<size_t>(p / limits_.virtual_block_tokens)];
    if (!Mine(plan, step.handle, block, p % limits_.virtual_block_tokens, users)) return row;
    SlotOf(live, p) = {.history = live.history[i], .position = p, .token = live.tokens[i]};
  }
  live.computed = end;
  // A query at `end` - 1 sees the whole context.
  std::vector<int32_t> context;
  for (int64_t p = 0; p < end; ++p) {
    const Slot& slot = SlotOf(live, p);
    const auto i = static_cast<size_t>(p);
    if (slot.history != live.history[i] || slot.position != p || slot.token != live.tokens[i]) {
      Wrong(plan, step.handle,
            fmt::format("the slot of position {} (block {}) holds position {}, token {} of another history", p,
                        live.blocks[static_cast<size_t>(p / limits_.virtual_block_tokens)], slot.position, slot.token));
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
    for (const BlockCopy& c : s.copies)
      text += fmt::format("    copy {} -> {}: {}\n", c.source, c.destination, c.tokens);
  }
  return text;
}

}  // namespace weft
