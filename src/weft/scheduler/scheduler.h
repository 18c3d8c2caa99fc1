#pragma once
// Continuous batching: decides which tokens of which requests run in the next step, and gives them KV blocks. Knows
// tokens and virtual blocks, no ranks, no text and no clock of its own. Plans depend on the calls made and on nothing
// else. For one thread.
//
// Each step: first every decoding request gets its one token, so that a long prompt never holds up the others' streams;
// then running prompts go on, then waiting requests are admitted, while the budget of tokens lasts. All three go by
// (priority, arrival), and nobody overtakes at admission. A request is admitted only with blocks for all of its known
// tokens, so that a prompt once begun can be finished. When a decoding request finds no block, the running request of
// least priority that arrived last is preempted: it gives its blocks back, keeps its tokens, and computes them again.
// The best request can thus always have the blocks it needs, so that every request gets done.
//
// A request begins behind the tokens that the prefix cache knows (kv/prefix_cache.h): those of other requests, and its
// own when it was preempted. Its blocks are made known as they are computed: full ones at once, the last one with each
// chunk of a prompt and when the request ends.

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "weft/api/request.h"
#include "weft/api/sampling_params.h"
#include "weft/core/error.h"
#include "weft/cp/layout.h"
#include "weft/kv/kv_manager.h"
#include "weft/runner/step_plan.h"

namespace weft {

struct SchedulerConfig {
  int64_t max_model_len = 0;              // --max-model-len: prompt and output together
  int64_t max_num_batched_tokens = 2048;  // --max-num-batched-tokens: tokens run in one step
  int64_t max_num_seqs = 256;             // --max-num-seqs: requests running at once
  // --enable-chunked-prefill. Off: the known tokens of a request are run in one step or not yet.
  bool chunked_prefill = true;
  bool prefix_caching = true;  // --enable-prefix-caching
};

// Throws weft::Error naming the flag, the value and the rule.
void Validate(const SchedulerConfig& config);

struct SchedulerStats {
  int64_t running = 0;
  int64_t waiting = 0;                       // preempted ones included
  uint64_t preemptions = 0;                  // so far
  double kv_cache_usage = 0;                 // share of the blocks in use, 0 .. 1
  std::vector<int64_t> kv_tokens_per_shard;  // of running requests; what they share counts once
  // So far, in tokens: those looked up in the prefix cache when requests were first admitted, and those found.
  uint64_t prefix_cache_queries = 0;
  uint64_t prefix_cache_hits = 0;
};

// What a request would meet if it were added now.
struct SchedulerProspect {
  int64_t cached_tokens = 0;  // so many of its prompt are in the prefix cache
  int64_t tokens_ahead = 0;   // of live requests: known, but not computed yet
  int64_t requests = 0;       // live ones
  bool must_wait = false;     // for others to end: all places are taken, or the free blocks are too few
};

class Scheduler {
 public:
  using Clock = std::chrono::steady_clock;

  // What may be read of a live request.
  struct Request {
    RequestHandle handle = 0;
    int32_t priority = 0;
    SamplingParams params;
    std::vector<int32_t> tokens;  // the prompt's and the sampled ones
    int64_t prompt_tokens = 0;
    std::string cache_salt;
    int64_t computed = 0;       // tokens whose KV is in the cache
    int64_t cached_tokens = 0;  // so many of the prompt were in the prefix cache when it was first admitted
    int32_t preemptions = 0;
    bool running = false;
    Clock::time_point arrived;
    std::optional<Clock::time_point> admitted;  // first time, if yet

    int64_t num_tokens() const { return static_cast<int64_t>(tokens.size()); }
    int64_t output_tokens() const { return num_tokens() - prompt_tokens; }
  };

  // `num_blocks`: virtual blocks (StepExecutor::num_blocks). Validates the config.
  Scheduler(const SchedulerConfig& config, const cp::KvLayout& layout, int64_t num_blocks);

  // Puts a request into the queue, or says why it can never be served (kInvalidArgument with `param`): no token at all,
  // too long for the model, or for the whole KV cache at its greatest length. Of `request`, the id is not used.
  // `cached_tokens`: what Foresee found, where that was asked; only what Foresee says of others depends on it.
  Result<RequestHandle> Add(EngineRequest request, Clock::time_point now = Clock::now(), int64_t cached_tokens = 0);

  // Changes nothing, the order in which cached blocks are given up included.
  SchedulerProspect Foresee(const EngineRequest& request) const;

  // Forgets a request in any state, also between Plan and Update, and frees its blocks; whether there was one.
  bool Finish(RequestHandle handle);

  // Whether a request is waiting or running. If so, the next plan has at least one row.
  bool HasRequests() const { return !requests_.empty(); }

  // The next step. It is to be executed and given to Update before the next one is planned.
  StepPlan Plan(Clock::time_point now = Clock::now());

  // Takes in what the step gave, and returns the rows that concern live requests: at most one each, with the token (it
  // is in the request's tokens by now), its log-probabilities, those of prompt tokens (each position once, preemption
  // or not), or an error; a request with an error is gone by now. The caller ends requests with Finish before the next
  // Plan: at params.max_tokens and max_model_len at the latest (CheckStop).
  std::vector<RowOutput> Update(const StepPlan& plan, StepOutput output);

  // Null when there is no such request. Valid as long as the request lives.
  const Request* Find(RequestHandle handle) const;

  int64_t num_running() const { return static_cast<int64_t>(running_.size()); }
  int64_t num_waiting() const { return static_cast<int64_t>(waiting_.size()); }
  // Walks over the running requests.
  SchedulerStats Stats() const;
  // The longest sequence that the KV cache can hold.
  int64_t CapacityTokens() const { return kv_.CapacityTokens(); }

 private:
  struct Entry : Request {
    BlockTable table;
    // The ranks were told of this request, its first `told_tokens` tokens and its first `told_blocks` blocks.
    bool told = false;
    int64_t told_tokens = 0;
    size_t told_blocks = 0;
    // All tokens that were known when it was (last) admitted: until they are computed it is in prefill.
    int64_t prefill_until = 0;
    int64_t expects_cached = 0;     // until it is first admitted: what the prefix cache will have of it, as foreseen
    int64_t planned = 0;            // tokens in the plan being made or executed
    size_t shared_blocks = 0;       // found in the prefix cache when it was (last) admitted
    bool failed = false;            // what it computed is not to be used by others
    bool awaits_token = false;      // the plan being executed samples for it
    std::vector<BlockCopy> copies;  // to be told with the plan being made
    int64_t next_logprob = 0;       // first prompt position whose log-probabilities have not been handed out

    bool in_prefill() const { return computed < prefill_until; }
  };
  struct Before {
    bool operator()(const Entry* a, const Entry* b) const {
      return a->priority != b->priority ? a->priority < b->priority : a->handle < b->handle;
    }
  };
  // By (priority, arrival): handles are given in the order of arrival.
  using Queue = std::set<Entry*, Before>;

  void PlanDecodes(int64_t& budget);
  void PlanPrefills(int64_t& budget);
  void Admit(int64_t& budget, Clock::time_point now, StepPlan& plan);
  // Whether it may use what the prefix cache knows, and what that is.
  bool LooksUp(const Entry& entry) const;
  PrefixHit Lookup(const Entry& entry) const;
  // Whether a request with so many blocks to take would stay behind at the next admission, roughly: what the waiting
  // ones share with others is not looked up again.
  bool LacksRoom(int64_t blocks) const;
  // Its computed tokens become known to the prefix cache.
  void Publish(Entry& entry, bool with_partial);
  // Gives its blocks back, for others to find what is in them.
  void FreeBlocks(Entry& entry);
  // Frees blocks until `entry` has room for its newest token; false when it had to go itself.
  bool MakeRoom(Entry& entry);
  void Preempt(Entry& entry);
  // The row of the plan, with all that the ranks do not know yet.
  RequestStep Tell(Entry& entry);
  // Keeps of `row` what is new and meant for the caller, and appends its token.
  void TakeIn(Entry& entry, RowOutput& row);
  Entry* FindEntry(RequestHandle handle);

  SchedulerConfig config_;
  KvManager kv_;
  std::unordered_map<RequestHandle, std::unique_ptr<Entry>> requests_;
  Queue waiting_;
  Queue running_;
  int64_t tokens_ahead_ = 0;             // known tokens of all requests that are not computed
  bool left_without_blocks_ = false;     // the last plan had no blocks for a request that waits
  std::vector<RequestHandle> released_;  // to be told with the next plan
  RequestHandle next_handle_ = 1;
  uint64_t next_step_ = 0;
  bool executing_ = false;  // between Plan and Update
  uint64_t preemptions_ = 0;
  uint64_t prefix_queries_ = 0;
  uint64_t prefix_hits_ = 0;
  std::vector<int32_t> pinned_;  // sources of the copies of the step being executed
};

}  // namespace weft
