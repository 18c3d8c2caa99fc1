#pragma once
// Random mixes of requests through the real scheduler and real ranks, for the property that weft stands on: whatever
// shares a step with a request, however its tokens are cut, dealt, cached, preempted and exchanged, its logits are
// those of the same request alone on one rank.
//
// A mix says everything that happens, so that a failing one can be read and run again.

#include <rapidcheck.h>

#include <cstdint>
#include <iosfwd>
#include <string>
#include <vector>

#include "weft/cp/grid.h"
#include "weft/model/config.h"
#include "weft/runner/executor.h"

namespace weft::testing {

// A kind of model, and what of the executor comes with it.
struct ModelKind {
  std::string name;
  ModelConfig config;
  cp::ModelHeads heads;  // which layouts are legal
};
// All kinds that the property is to hold for. A new one is added here and nowhere else.
const std::vector<ModelKind>& ModelKinds();

// Every legal (TP, PCP, DCP, interleave, block size, KV layout) of up to `max_ranks` ranks, those of few ranks first.
std::vector<cp::ParallelConfig> LegalLayouts(const ModelKind& kind, int max_ranks);

struct MixRequest {
  int wait = 0;        // steps between the arrival of the request before and this one's
  int parent = 0;      // which of the earlier requests it begins like (by remainder)
  double shared = 0;   // what part of the parent's tokens, output so far included, it begins with
  int64_t own = 1;     // further tokens of prompt
  uint64_t seed = 0;   // of these
  int max_tokens = 1;  // of output
  int priority = 0;
  bool salted = false;
  bool prompt_logprobs = false;
  int abort_after = -1;             // steps after its arrival that its client leaves; -1: never
  bool abort_in_execution = false;  // while that step runs, and not before it
};

struct Mix {
  size_t kind = 0;  // index into ModelKinds()
  uint64_t weights = 0;
  cp::ParallelConfig parallel;
  ContextExchange exchange = ContextExchange::kAuto;
  cp::MachineRates rates;  // what kAuto goes by
  int64_t pcp_min_tokens = 1;
  int64_t solo_max_tokens = 0;
  int32_t threads_per_rank = 1;
  bool stream = false;  // messages, as between processes, where memory is shared
  int64_t segment_tokens = 8192;
  int64_t spare_blocks = 0;  // beyond those of the request that needs most
  int64_t max_num_batched_tokens = 2048;
  int64_t max_num_seqs = 256;
  bool chunked_prefill = true;
  bool prefix_caching = true;
  std::vector<MixRequest> requests;
};
std::ostream& operator<<(std::ostream& out, const Mix& mix);

// To be called inside a property.
Mix AnyMix(size_t kind);

// How often what is rare happened, over all mixes: a property that never meets it proves little.
struct MixCounts {
  int64_t mixes = 0;
  int64_t steps = 0;
  int64_t compared_logits = 0;  // positions
  int64_t compared_tokens = 0;
  int64_t preemptions = 0;
  int64_t prefix_hits = 0;  // tokens
  int64_t copied = 0;       // tokens
  int64_t aborts = 0;
  int64_t aborts_in_execution = 0;
  int64_t recomputed = 0;   // positions computed more than once
  int64_t router_ties = 0;  // positions whose experts were chosen by a hair, the other way
};

// Runs the mix and compares. The first thing that is wrong, or "".
std::string Problem(const Mix& mix, MixCounts& counts);

}  // namespace weft::testing
