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

// A rank's chunks of a prompt, those that touch joined (on one rank, and where the tail follows the head).
std::vector<cp::Chunk> JoinedChunks(const RequestStep& step, int32_t ranks, int32_t rank) {
  std::vector<cp::Chunk> chunks = cp::SplitPrefill(step.computed, step.tokens, ranks, rank);
  if (chunks.size() == 2 && chunks[0].first + chunks[0].tokens == chunks[1].first) {
    chunks[0].tokens += chunks[1].tokens;
    chunks.pop_back();
  }
  return chunks;
}

}  // namespace

RankBatch MakeRankBatch(const StepPlan& plan, const RequestTable& table, const cp::ParallelConfig& parallel,
                        const cp::RankCoord& coord) {
  const cp::KvLayout layout = LayoutOf(parallel);
  const int32_t pcp_size = parallel.prefill_context_parallel;
  RankBatch batch;
  ForwardBatch& f = batch.forward;
  f.prefill_slots.resize(static_cast<size_t>(pcp_size));

  auto add_segment = [&](size_t request, const RequestState& state, int64_t first, int64_t tokens, bool decode) {
    const RequestStep& step = plan.requests[request];
    QuerySegment segment{
        .request = request, .row0 = f.rows, .rows = tokens, .first_position = first, .block_table = state.block_table};
    for (int64_t x = first; x < first + tokens; ++x) {
      f.token_ids.push_back(state.tokens[static_cast<size_t>(x)]);
      f.positions.push_back(static_cast<int32_t>(x));
      LogitsRow row{.row = f.rows, .request = request, .position = x};
      row.sample = step.sample && x == step.computed + step.tokens - 1;
      row.prompt_logprob = state.params.prompt_logprobs.has_value() && x + 1 < state.prompt_tokens;
      const bool looked_at_here = !decode || coord.pcp == 0;
      if (looked_at_here && (row.sample || row.prompt_logprob || plan.capture_logits)) batch.logits.push_back(row);
      ++f.rows;
    }
    (decode ? f.decode : f.prefill).push_back(segment);
  };

  for (size_t i = 0; i < plan.requests.size(); ++i) {
    const RequestStep& step = plan.requests[i];
    if (!step.prefill) continue;
    f.any_prefill = true;
    const RequestState& state = table.Get(step.handle);
    for (int32_t peer = 0; peer < pcp_size; ++peer) {
      for (const cp::Chunk& chunk : JoinedChunks(step, pcp_size, peer)) {
        for (int64_t x = chunk.first; x < chunk.first + chunk.tokens; ++x) {
          f.prefill_slots[static_cast<size_t>(peer)].push_back(SlotOn(layout, coord.kv_shard, state.block_table, x));
        }
        if (peer == coord.pcp) add_segment(i, state, chunk.first, chunk.tokens, false);
      }
    }
  }
  f.prefill_rows = f.rows;
  for (size_t i = 0; i < plan.requests.size(); ++i) {
    const RequestStep& step = plan.requests[i];
    if (step.prefill) continue;
    f.any_decode = true;
    const RequestState& state = table.Get(step.handle);
    add_segment(i, state, step.computed, step.tokens, true);
    f.decode_slots.push_back(SlotOn(layout, coord.kv_shard, state.block_table, step.computed));
  }

  f.visible.resize(static_cast<size_t>(layout.shards * f.rows));
  for (int32_t shard = 0; shard < layout.shards; ++shard) {
    for (int64_t row = 0; row < f.rows; ++row) {
      f.visible[static_cast<size_t>(shard * f.rows + row)] =
          static_cast<int32_t>(layout.LocalLen(f.positions[static_cast<size_t>(row)] + 1, shard));
    }
  }
  return batch;
}

}  // namespace weft
