#pragma once
// One rank's part of a global step.

#include <cstdint>
#include <vector>

#include "weft/cp/deal.h"
#include "weft/cp/exchange_cost.h"
#include "weft/cp/grid.h"
#include "weft/cp/layout.h"
#include "weft/model/forward_batch.h"
#include "weft/runner/request_table.h"
#include "weft/runner/step_plan.h"

namespace weft {

// How rows meet the keys of other shards (--cp-context-exchange).
enum class ContextExchange {
  kAuto,  // what costs less (cp/exchange_cost.h); rates not known: prefill rows gather KV, decode rows gather Q
  kGatherQ,
  kGatherKv,
};

// The same on all ranks.
struct BatchOptions {
  cp::ParallelConfig parallel;
  cp::QueryCosts costs;
  ContextExchange exchange = ContextExchange::kAuto;
  // MLA: gather-Q rows attend to the latents in absorbed form, gather-KV rows to expanded keys and values. So the
  // choice matters on a single shard, too.
  bool mla = false;
  // What the choice by cost goes by. The same on all ranks, as everything here.
  cp::AttentionShape attention;
  cp::MachineRates rates = {};
  bool messages = false;  // keys come in messages: some KV shards' memory is not shared
  // Steps of up to so many tokens in which no prompt is cut are run by PCP rank 0 with the threads of all (0: never).
  // Where PCP ranks share memory that beats dealing out a few rows: the weights are read once.
  int64_t solo_max_tokens = 0;
};

// A row of the batch whose logits somebody wants.
struct LogitsRow {
  int64_t row = 0;
  size_t request = 0;  // index into StepPlan::requests
  int64_t position = 0;
  bool sample = false;          // choose the request's next token here
  bool prompt_logprob = false;  // report the log-probability of the prompt token at position + 1
};

struct RankBatch {
  ForwardBatch forward;
  std::vector<LogitsRow> logits;  // in order of the rows; the same on all TP ranks of a PCP rank
};

// What a step's ranks have in common: a pure function of the plan.
struct StepDeal {
  bool solo = false;                               // PCP rank 0 runs it alone
  int32_t ranks = 1;                               // PCP ranks that run it
  bool over_pcp = false;                           // gather-Q exchanges over the PCP ranks, too
  std::vector<std::vector<cp::DealtChunk>> dealt;  // [ranks] the chunks of each
  std::vector<bool> gathers_q;                     // by request of the plan
};
StepDeal DealStep(const StepPlan& plan, const BatchOptions& options);

// What the step counts for, but for the bytes.
ContextCounts CountContext(const StepPlan& plan, const StepDeal& deal);

// The most rows that any rank of the replica has in this step; 0 where there is no request.
int64_t MostRows(const StepDeal& deal);

// Pure: every rank derives its own part, and what it must know of its peers', from the plan (after
// `table.Apply(plan)`) and its deal. The block tables in the result are views of `table`'s.
RankBatch MakeRankBatch(const StepPlan& plan, const StepDeal& deal, const RequestTable& table,
                        const cp::ParallelConfig& parallel, const cp::RankCoord& coord);

}  // namespace weft
