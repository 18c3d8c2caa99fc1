#pragma once
// One step of the whole engine, as the scheduler plans it: global, in tokens and virtual blocks, without ranks. The
// same plan goes to every rank, which derives its own part from it with the functions of cp/.

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "weft/api/request.h"
#include "weft/api/sampling_params.h"

namespace weft {

using RequestHandle = uint64_t;

// Told to the ranks once, with the first step that the request takes part in; they keep it until it is released.
struct NewRequest {
  RequestHandle handle = 0;
  std::vector<int32_t> prompt_token_ids;
  SamplingParams params;
};

// The first `tokens` tokens of a virtual block, put into another one: of what a rank stores of them on its shard, all
// layers, before anything of the step is computed. The source is not written to in this step (below its first `tokens`
// tokens), the destination belongs to the request alone.
struct BlockCopy {
  int32_t source = 0;
  int32_t destination = 0;
  int64_t tokens = 0;
};

// What one request does in this step: its tokens [computed, computed + tokens) are run.
struct RequestStep {
  RequestHandle handle = 0;
  int64_t computed = 0;  // tokens whose KV is in the cache already
  int64_t tokens = 0;    // tokens to run now, >= 1
  // Still working off known tokens (prompt, or recomputation after a preemption). A decode row is the newest token
  // alone. Never to be guessed from `tokens`: a chunk of a prompt may be one token long.
  bool prefill = false;
  bool sample = false;  // these tokens are the last known ones: choose the next token
  // Tokens sampled in earlier steps that the ranks have not been told yet; they follow the tokens the ranks know.
  std::vector<int32_t> appended_token_ids;
  // Virtual blocks to put into the request's block table from index first_block on; what was there is cut off.
  // first_block = 0 starts anew (first step, or the first after a preemption).
  int32_t first_block = 0;
  std::vector<int32_t> block_ids;
  // Only where the request is in prefill and its block table begins anew: what it shares of a block with others that go
  // on differently. Counted in `computed`.
  std::vector<BlockCopy> copies;
};

struct StepPlan {
  uint64_t step = 0;
  std::vector<NewRequest> admitted;
  std::vector<RequestHandle> released;  // finished or aborted: forget them (before anything else in this plan)
  std::vector<RequestStep> requests;
  bool capture_logits = false;  // tests: every query token's logits come back in StepOutput::logits
};

// What a step gave for one request.
struct RowOutput {
  RequestHandle handle = 0;
  std::optional<int32_t> token_id;  // where RequestStep::sample was set
  std::optional<PositionLogprobs> logprobs;
  // Prompt log-probabilities of tokens first_prompt_position, +1, ... where asked for.
  int64_t first_prompt_position = 0;
  std::vector<PositionLogprobs> prompt_logprobs;
  // capture_logits: positions and their logits [positions, vocab].
  std::vector<int64_t> logit_positions;
  std::vector<float> logits;
  std::vector<float> router_margins;  // [positions], Transformer::router_margins; empty without experts
  // This request alone failed (its numbers became NaN, say): it ends with an error, the others go on.
  std::optional<std::string> error;
};

struct StepOutput {
  std::vector<RowOutput> rows;
};

// What context parallelism did with the steps so far.
struct ContextCounts {
  uint64_t steps = 0;
  uint64_t solo_steps = 0;    // run by PCP rank 0 with the threads of all
  uint64_t cut_prefills = 0;  // chunks of prompts cut over PCP ranks, and those run whole on one
  uint64_t whole_prefills = 0;
  uint64_t gather_q_tokens = 0;  // query tokens by how they met their keys
  uint64_t gather_kv_tokens = 0;
  uint64_t exchanged_bytes = 0;  // given by the attention of this process's ranks to others, not read in place

  ContextCounts& operator+=(const ContextCounts& other) {
    steps += other.steps;
    solo_steps += other.solo_steps;
    cut_prefills += other.cut_prefills;
    whole_prefills += other.whole_prefills;
    gather_q_tokens += other.gather_q_tokens;
    gather_kv_tokens += other.gather_kv_tokens;
    exchanged_bytes += other.exchanged_bytes;
    return *this;
  }
};

// Runs steps on all ranks. Implemented over threads and over processes by runner/; faked in scheduler and engine tests.
class StepExecutor {
 public:
  virtual ~StepExecutor() = default;
  // One step, start to end. Throws weft::Error (kInternal) when a rank failed: the executor is dead then.
  virtual StepOutput Execute(const StepPlan& plan) = 0;
  // Virtual blocks in each rank's KV cache.
  virtual int64_t num_blocks() const = 0;
  // Rows that each expert of the replica's ranks has computed since the start, all layers together; empty for a model
  // without experts. Thread-safe.
  virtual std::vector<int64_t> ExpertLoad() const { return {}; }
  // Of this replica. Thread-safe.
  virtual ContextCounts Context() const { return {}; }
  // Called once, from a thread of the executor, when it finds out between steps that it is dead: with the reason. After
  // this has returned, an earlier listener is not called any more.
  virtual void SetFailureListener(std::function<void(const std::string& why)>) {}
};

}  // namespace weft
