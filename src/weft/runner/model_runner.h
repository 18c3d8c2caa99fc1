#pragma once
// One rank's step: its part of the plan, the forward pass, and the choice of the next tokens.

#include <memory>
#include <vector>

#include "weft/core/buffer.h"
#include "weft/model/transformer.h"
#include "weft/runner/rank_batch.h"
#include "weft/runner/request_table.h"
#include "weft/runner/step_plan.h"

namespace weft {

class ModelRunner {
 public:
  // Collective, like Transformer's constructor.
  explicit ModelRunner(Transformer::Options options);

  // Collective over all ranks, each with the same plan, deal (DealStep) and table. Gives what this rank found out: the
  // rows of the requests whose logits it looked at (TP rank 0 only; requests may turn up on several PCP ranks, see
  // MergeOutputs). Replicas that share experts step together, those without requests with an empty plan; `most_rows` is
  // then MostRows over all of them.
  std::vector<RowOutput> Step(const StepPlan& plan, const StepDeal& deal, const RequestTable& table,
                              int64_t most_rows = 0);

  // ContextAttention::exchanged_bytes.
  int64_t exchanged_bytes() const { return transformer_.exchanged_bytes(); }
  // MoeExperts::load; empty without experts.
  std::span<const int64_t> expert_load() const { return transformer_.expert_load(); }

 private:
  void CopyBlocks(const StepPlan& plan);
  void LookAt(const LogitsRow& row, const RequestState& state, const StepPlan& plan, std::span<float> logits,
              RowOutput& out) const;

  Transformer::Options o_;
  Transformer transformer_;
  Buffer logits_;
};

// One RowOutput per request of the plan, in its order, from those of the ranks: prompt log-probabilities and captured
// logits put together in order of position.
StepOutput MergeOutputs(const StepPlan& plan, std::vector<std::vector<RowOutput>> ranks);

}  // namespace weft
