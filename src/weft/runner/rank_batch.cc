#include "weft/runner/rank_batch.h"

#include "weft/core/error.h"

namespace weft {
namespace {

cp::KvLayout LayoutOf(const cp::ParallelConfig& parallel) {
  return {.block_tokens = parallel.block_tokens, .interleave = parallel.kv_interleave, .shards = parallel.KvShards()};
}

// The slot of global position x on `shard`, -1 where another shard owns it.
int64_t SlotOn(const cp::KvLayout& layout, int32_t shard, const std::vector<int32_t>& block_table, int64_t x) {
  if (layout.Owner(x) != shard) return -1;
  const auto vb = static_cast<size_t>(layout.VirtualBlock(x));
  WEFT_CHECK(vb < block_table.size(), "position {} lies beyond the block table of {} blocks", x, block_table.size());
  return int64_t{block_table[vb]} * layout.block_tokens + layout.Offset(x);
}

bool GathersQ(const BatchOptions& options, const RequestStep& step) {
  if (options.parallel.KvShards() == 1) return false;
  switch (options.exchange) {
    case ContextExchange::kGatherQ:
      return true;
    case ContextExchange::kGatherKv:
      return false;
    case ContextExchange::kAuto:
      // By state, not by length. A decode row reads its whole context for a handful of multiplications a key: best
      // where each key is read once, by the rank that holds it. A prefill row does far more arithmetic than reading,
      // and its keys are in reach of every rank.
      return !step.prefill;
  }
  return false;
}

}  // namespace

RankBatch MakeRankBatch(const StepPlan& plan, const RequestTable& table, const BatchOptions& options,
                        const cp::RankCoord& coord) {
  const cp::ParallelConfig& parallel = options.parallel;
  const cp::KvLayout layout = LayoutOf(parallel);
  std::vector<cp::QueryItem> items;
  for (const RequestStep& step : plan.requests) items.push_back({step.computed, step.tokens, !step.prefill});
  const auto dealt = cp::DealQueries(items, options.costs, parallel.prefill_context_parallel);

  RankBatch batch;
  ForwardBatch& f = batch.forward;
  // The PCP ranks whose shards together hold a request: all of them, or this one alone where KV is replicated.
  const bool pcp_shards = layout.shards > parallel.decode_context_parallel;
  int64_t gathered = 0;
  for (int32_t pcp = 0; pcp < parallel.prefill_context_parallel; ++pcp) {
    const bool own = pcp == coord.pcp;
    auto& slots = f.slots.emplace_back();
    for (const bool gather_q : {false, true}) {
      const int64_t gathered_before = gathered;
      for (const auto& [item, chunk] : dealt[static_cast<size_t>(pcp)]) {
        const RequestStep& step = plan.requests[item];
        if (GathersQ(options, step) != gather_q) continue;
        (gather_q ? f.any_gather_q : f.any_gather_kv) = true;
        const RequestState& state = table.Get(step.handle);
        QuerySegment segment{
            .request = item, .rows = chunk.tokens, .first_position = chunk.first, .block_table = state.block_table};
        for (int64_t x = chunk.first; x < chunk.first + chunk.tokens; ++x) {
          slots.push_back(SlotOn(layout, coord.kv_shard, state.block_table, x));
        }
        if (gather_q && (own || pcp_shards)) {
          segment.row0 = gathered;
          f.gather_q.push_back(segment);
          gathered += chunk.tokens;
          for (int64_t x = chunk.first; x < chunk.first + chunk.tokens; ++x) {
            f.gather_q_visible.push_back(static_cast<int32_t>(layout.LocalLen(x + 1, coord.kv_shard)));
          }
        }
        if (!own) continue;
        if (!gather_q) {
          segment.row0 = f.rows;
          f.gather_kv.push_back(segment);
          f.gather_kv_rows += chunk.tokens;
        }
        for (int64_t x = chunk.first; x < chunk.first + chunk.tokens; ++x) {
          f.token_ids.push_back(state.tokens[static_cast<size_t>(x)]);
          f.positions.push_back(static_cast<int32_t>(x));
          LogitsRow row{.row = f.rows++, .request = item, .position = x};
          row.sample = step.sample && x == step.computed + step.tokens - 1;
          row.prompt_logprob = state.params.prompt_logprobs.has_value() && x + 1 < state.prompt_tokens;
          if (row.sample || row.prompt_logprob || plan.capture_logits) batch.logits.push_back(row);
        }
      }
      if (gather_q && (own || pcp_shards)) f.gather_q_rows.push_back(gathered - gathered_before);
    }
  }

  for (int32_t shard = 0; shard < layout.shards; ++shard) {
    for (int64_t row = 0; row < f.gather_kv_rows; ++row) {
      f.gather_kv_visible.push_back(
          static_cast<int32_t>(layout.LocalLen(f.positions[static_cast<size_t>(row)] + 1, shard)));
    }
  }
  return batch;
}

}  // namespace weft
