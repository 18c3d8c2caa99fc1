#include "weft/scheduler/scheduler.h"

#include <algorithm>
#include <utility>

namespace weft {

void Validate(const SchedulerConfig& config) {
  const auto refuse = [](const char* flag, int64_t value, const std::string& rule) {
    throw Error(fmt::format("{} = {}: {}", flag, value, rule), ErrorKind::kInvalidArgument, flag);
  };
  constexpr const char kBatched[] = "--max-num-batched-tokens";
  if (config.max_model_len < 2) {
    refuse("--max-model-len", config.max_model_len, "must be at least 2: a token of prompt and one of output");
  }
  if (config.max_num_seqs < 1) refuse("--max-num-seqs", config.max_num_seqs, "must be at least 1");
  if (config.max_num_batched_tokens < config.max_num_seqs) {
    refuse(kBatched, config.max_num_batched_tokens,
           fmt::format("must be at least --max-num-seqs = {}, so that every running request gets its token in a step",
                       config.max_num_seqs));
  }
  if (!config.chunked_prefill && config.max_num_batched_tokens < config.max_model_len) {
    refuse(kBatched, config.max_num_batched_tokens,
           fmt::format("must be at least --max-model-len = {} with --no-enable-chunked-prefill, since a prompt has to "
                       "fit into one step",
                       config.max_model_len));
  }
}

Scheduler::Scheduler(const SchedulerConfig& config, const cp::KvLayout& layout, int64_t num_blocks)
    : config_(config), kv_(layout, num_blocks, config.prefix_caching) {
  Validate(config);
}

Result<RequestHandle> Scheduler::Add(EngineRequest request, Clock::time_point now, int64_t cached_tokens) {
  const auto refuse = [](const char* param, std::string message) {
    return tl::make_unexpected(Error(std::move(message), ErrorKind::kInvalidArgument, param));
  };
  const auto prompt = static_cast<int64_t>(request.prompt_token_ids.size());
  if (prompt == 0) return refuse("prompt", "The prompt is empty: it must have at least one token.");
  if (request.params.max_tokens < 1) {
    return refuse("max_tokens", fmt::format("max_tokens = {}: must be at least 1.", request.params.max_tokens));
  }
  if (prompt >= config_.max_model_len) {
    return refuse("prompt", fmt::format("The prompt has {} tokens, but the maximum context length is {} tokens for "
                                        "prompt and output together: at most {} tokens of prompt leave room for one.",
                                        prompt, config_.max_model_len, config_.max_model_len - 1));
  }
  // The newest token's KV is not needed before a further token is.
  const int64_t longest = std::min(prompt + request.params.max_tokens, config_.max_model_len) - 1;
  if (longest > kv_.CapacityTokens()) {
    return refuse(prompt > kv_.CapacityTokens() ? "prompt" : "max_tokens",
                  fmt::format("{} tokens of prompt and up to {} of output can never fit into the KV cache, which holds "
                              "{} tokens.",
                              prompt, longest + 1 - prompt, kv_.CapacityTokens()));
  }

  auto entry = std::make_unique<Entry>();
  entry->handle = next_handle_++;
  entry->priority = request.priority;
  entry->params = std::move(request.params);
  entry->tokens = std::move(request.prompt_token_ids);
  entry->cache_salt = std::move(request.cache_salt);
  entry->prompt_tokens = prompt;
  entry->arrived = now;
  entry->expects_cached = std::clamp<int64_t>(cached_tokens, 0, prompt);
  tokens_ahead_ += prompt - entry->expects_cached;
  waiting_.insert(entry.get());
  const RequestHandle handle = entry->handle;
  requests_.emplace(handle, std::move(entry));
  return handle;
}

SchedulerProspect Scheduler::Foresee(const EngineRequest& request) const {
  SchedulerProspect prospect{.tokens_ahead = tokens_ahead_, .requests = num_running() + num_waiting()};
  PrefixHit hit;
  if (config_.prefix_caching && !request.params.prompt_logprobs) {
    hit = kv_.FindPrefix(request.cache_salt, request.prompt_token_ids);
  }
  prospect.cached_tokens = hit.tokens;
  prospect.must_wait = LacksRoom(kv_.BlocksToTake(hit, static_cast<int64_t>(request.prompt_token_ids.size())));
  return prospect;
}

bool Scheduler::LacksRoom(int64_t blocks) const {
  if (num_running() + num_waiting() >= config_.max_num_seqs) return true;
  if (left_without_blocks_ && !waiting_.empty()) return true;
  int64_t free = kv_.num_free_blocks() - blocks;
  for (auto it = waiting_.begin(); it != waiting_.end() && free >= 0; ++it) {
    free -= kv_.layout().BlocksFor((*it)->num_tokens() - (*it)->expects_cached);
  }
  return free < 0;
}

bool Scheduler::Finish(RequestHandle handle) {
  const auto found = requests_.find(handle);
  if (found == requests_.end()) return false;
  Entry& entry = *found->second;
  tokens_ahead_ -= entry.num_tokens() - entry.computed - entry.expects_cached;
  // A step that is being executed still writes into these blocks, and is over before their next owner's first step.
  FreeBlocks(entry);
  (entry.running ? running_ : waiting_).erase(&entry);
  if (entry.told) released_.push_back(handle);
  requests_.erase(found);
  return true;
}

StepPlan Scheduler::Plan(Clock::time_point now) {
  WEFT_CHECK(!executing_, "the previous step was not given to Update");
  executing_ = true;
  StepPlan plan;
  plan.step = next_step_++;
  plan.released = std::exchange(released_, {});

  int64_t budget = config_.max_num_batched_tokens;
  PlanDecodes(budget);
  PlanPrefills(budget);
  Admit(budget, now, plan);

  plan.requests.reserve(running_.size());
  for (const bool prefill : {false, true}) {
    for (Entry* entry : running_) {
      if (entry->planned > 0 && entry->in_prefill() == prefill) plan.requests.push_back(Tell(*entry));
    }
  }
  return plan;
}

void Scheduler::PlanDecodes(int64_t& budget) {
  for (auto it = running_.begin(); it != running_.end(); ++it) {
    Entry& entry = **it;
    if (entry.in_prefill()) continue;
    WEFT_CHECK(entry.output_tokens() < entry.params.max_tokens && entry.num_tokens() < config_.max_model_len,
               "request {} was not finished at its greatest length", entry.handle);
    if (!MakeRoom(entry)) return;  // it was the last of those that run
    entry.planned = 1;
    --budget;
  }
}

void Scheduler::PlanPrefills(int64_t& budget) {
  for (Entry* entry : running_) {
    if (budget == 0) return;
    if (!entry->in_prefill()) continue;
    entry->planned = std::min(entry->prefill_until - entry->computed, budget);
    budget -= entry->planned;
  }
}

void Scheduler::Admit(int64_t& budget, Clock::time_point now, StepPlan& plan) {
  left_without_blocks_ = false;
  while (budget > 0 && !waiting_.empty() && num_running() < config_.max_num_seqs) {
    Entry& entry = **waiting_.begin();
    const int64_t tokens = entry.num_tokens();
    PrefixHit hit = Lookup(entry);
    if (!config_.chunked_prefill && tokens - hit.tokens > budget) return;
    // One that was preempted waits until everybody who runs could have a further block, or it would soon be preempted
    // again, and its whole recomputation be lost each time.
    const auto spare = entry.preemptions > 0 ? num_running() : 0;
    if (!kv_.AllocateWithPrefix(entry.table, hit, tokens, spare)) {
      left_without_blocks_ = true;
      return;
    }
    if (hit.copy_source >= 0) {
      // Until the step has run, nobody may be given the source.
      pinned_.push_back(hit.copy_source);
      entry.copies.push_back({hit.copy_source, entry.table.blocks[hit.blocks.size()], hit.copy_tokens});
    }

    waiting_.erase(waiting_.begin());
    running_.insert(&entry);
    entry.running = true;
    entry.prefill_until = tokens;
    entry.computed = hit.tokens;
    tokens_ahead_ += std::exchange(entry.expects_cached, 0) - hit.tokens;
    entry.shared_blocks = hit.blocks.size();
    entry.planned = std::min(tokens - hit.tokens, budget);
    budget -= entry.planned;
    if (!entry.admitted) {
      entry.admitted = now;
      entry.cached_tokens = hit.tokens;
      if (LooksUp(entry)) {
        prefix_queries_ += static_cast<uint64_t>(tokens);
        prefix_hits_ += static_cast<uint64_t>(hit.tokens);
      }
    }
    if (!entry.told) {
      entry.told = true;
      entry.told_tokens = tokens;
      plan.admitted.push_back({entry.handle, entry.tokens, entry.params});
    }
  }
}

bool Scheduler::LooksUp(const Entry& entry) const {
  // A prompt's log-probabilities come of computing it.
  return config_.prefix_caching && (!entry.params.prompt_logprobs || entry.next_logprob >= entry.prompt_tokens);
}

PrefixHit Scheduler::Lookup(const Entry& entry) const {
  return LooksUp(entry) ? kv_.FindPrefix(entry.cache_salt, entry.tokens) : PrefixHit{};
}

void Scheduler::Publish(Entry& entry, bool with_partial) {
  const std::span<const int32_t> tokens(entry.tokens);
  kv_.Publish(entry.cache_salt, entry.table, tokens.first(static_cast<size_t>(entry.computed)), with_partial);
}

void Scheduler::FreeBlocks(Entry& entry) {
  if (entry.failed) {
    kv_.Unpublish(entry.table, entry.shared_blocks);
  } else if (!entry.table.blocks.empty()) {
    Publish(entry, true);
  }
  kv_.Free(entry.table);
}

bool Scheduler::MakeRoom(Entry& entry) {
  while (!kv_.Allocate(entry.table, entry.num_tokens())) {
    // Never one that is better than `entry`, so none that has its place in this plan already.
    Entry& victim = **running_.rbegin();
    Preempt(victim);
    if (&victim == &entry) return false;
  }
  return true;
}

void Scheduler::Preempt(Entry& entry) {
  WEFT_CHECK(entry.planned == 0, "request {} is in the plan", entry.handle);
  FreeBlocks(entry);
  entry.told_blocks = 0;
  tokens_ahead_ += entry.computed;
  entry.computed = 0;
  entry.prefill_until = 0;
  entry.running = false;
  ++entry.preemptions;
  ++preemptions_;
  running_.erase(&entry);
  waiting_.insert(&entry);
}

RequestStep Scheduler::Tell(Entry& entry) {
  RequestStep step;
  step.handle = entry.handle;
  step.computed = entry.computed;
  step.tokens = entry.planned;
  step.prefill = entry.in_prefill();
  step.sample = entry.awaits_token = entry.computed + entry.planned == entry.num_tokens();
  step.appended_token_ids.assign(entry.tokens.begin() + entry.told_tokens, entry.tokens.end());
  step.first_block = static_cast<int32_t>(entry.told_blocks);
  step.block_ids.assign(entry.table.blocks.begin() + static_cast<std::ptrdiff_t>(entry.told_blocks),
                        entry.table.blocks.end());
  step.copies = std::exchange(entry.copies, {});
  entry.told_tokens = entry.num_tokens();
  entry.told_blocks = entry.table.blocks.size();
  return step;
}

std::vector<RowOutput> Scheduler::Update(const StepPlan& plan, StepOutput output) {
  WEFT_CHECK(executing_ && plan.step + 1 == next_step_, "step {} is not the one planned last", plan.step);
  executing_ = false;
  for (const int32_t block : pinned_) kv_.Unpin(block);
  pinned_.clear();
  for (const RequestStep& step : plan.requests) {
    Entry* entry = FindEntry(step.handle);
    if (entry == nullptr) continue;
    tokens_ahead_ -= entry->planned;
    entry->computed += std::exchange(entry->planned, 0);
    Publish(*entry, step.prefill);
  }

  std::vector<RowOutput> rows;
  rows.reserve(output.rows.size());
  for (RowOutput& row : output.rows) {
    Entry* entry = FindEntry(row.handle);
    if (entry == nullptr) continue;  // finished while the step ran
    TakeIn(*entry, row);
    const bool failed = row.error.has_value();
    if (row.token_id || failed || !row.prompt_logprobs.empty() || !row.logits.empty()) rows.push_back(std::move(row));
    if (!failed) continue;
    // Its KV may be what is wrong with it.
    entry->failed = true;
    Finish(rows.back().handle);
  }
  for (const RequestStep& step : plan.requests) {
    const Entry* entry = FindEntry(step.handle);
    if (entry == nullptr || !entry->awaits_token) continue;
    RowOutput& row = rows.emplace_back();
    row.handle = step.handle;
    row.error = "the step gave no token for this request";
    Finish(step.handle);
  }
  return rows;
}

void Scheduler::TakeIn(Entry& entry, RowOutput& row) {
  if (row.error) return;
  // A preempted request computes its prompt again, and its log-probabilities with it.
  const int64_t end = row.first_prompt_position + static_cast<int64_t>(row.prompt_logprobs.size());
  const int64_t known = std::clamp(entry.next_logprob, row.first_prompt_position, end);
  row.prompt_logprobs.erase(row.prompt_logprobs.begin(),
                            row.prompt_logprobs.begin() + (known - row.first_prompt_position));
  row.first_prompt_position = known;
  if (!row.prompt_logprobs.empty()) entry.next_logprob = end;

  if (!entry.awaits_token) {
    row.token_id.reset();
    row.logprobs.reset();
  } else if (row.token_id) {
    entry.awaits_token = false;
    entry.tokens.push_back(*row.token_id);
    ++tokens_ahead_;
  }
}

const Scheduler::Request* Scheduler::Find(RequestHandle handle) const {
  const auto found = requests_.find(handle);
  return found == requests_.end() ? nullptr : found->second.get();
}

Scheduler::Entry* Scheduler::FindEntry(RequestHandle handle) {
  const auto found = requests_.find(handle);
  return found == requests_.end() ? nullptr : found->second.get();
}

SchedulerStats Scheduler::Stats() const {
  const cp::KvLayout& layout = kv_.layout();
  SchedulerStats stats{.running = num_running(),
                       .waiting = num_waiting(),
                       .preemptions = preemptions_,
                       .kv_cache_usage = kv_.Usage(),
                       .kv_tokens_per_shard = std::vector<int64_t>(static_cast<size_t>(layout.shards)),
                       .prefix_cache_queries = prefix_queries_,
                       .prefix_cache_hits = prefix_hits_};
  const int64_t whole = layout.VirtualBlockTokens();
  std::vector<bool> counted(static_cast<size_t>(kv_.num_blocks()));
  int64_t full_blocks = 0;
  for (const Entry* entry : running_) {
    const auto full = static_cast<size_t>(entry->computed / whole);
    for (size_t i = 0; i < full; ++i) {
      const auto block = static_cast<size_t>(entry->table.blocks[i]);
      full_blocks += !counted[block];
      counted[block] = true;
    }
    // The last block is the request's own.
    for (int32_t shard = 0; shard < layout.shards; ++shard) {
      stats.kv_tokens_per_shard[static_cast<size_t>(shard)] += layout.LocalLen(entry->computed % whole, shard);
    }
  }
  for (int64_t& tokens : stats.kv_tokens_per_shard) tokens += full_blocks * layout.block_tokens;
  return stats;
}

}  // namespace weft
