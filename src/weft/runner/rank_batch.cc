#include "weft/runner/rank_batch.h"

#include <algorithm>

#include "weft/core/error.h"

namespace weft {
namespace {

// The slot of global position x on `shard`, -1 where another shard owns it.
int64_t SlotOn(const cp::KvLayout& layout, int32_t shard, const std::vector<int32_t>& block_table, int64_t x) {
  if (layout.Owner(x) != shard) return -1;
  const auto vb = static_cast<size_t>(layout.VirtualBlock(x));
  WEFT_CHECK(vb < block_table.size(), "position {} lies beyond the block table of {} blocks", x, block_table.size());
  return int64_t{block_table[vb]} * layout.block_tokens + layout.Offset(x);
}

bool IsSolo(const StepPlan& plan, const BatchOptions& options) {
  if (options.parallel.prefill_context_parallel == 1 || options.solo_max_tokens == 0) return false;
  int64_t tokens = 0;
  for (const RequestStep& step : plan.requests) {
    if (step.prefill && step.tokens >= options.costs.min_tokens_to_cut) return false;
    if (!step.copies.empty()) return false;  // every rank copies on its own shard
    tokens += step.tokens;
  }
  return tokens <= options.solo_max_tokens;
}

// By request of the plan: whether its rows gather Q. `shards`: among how many the ranks that run this step exchange;
// `ranks`: PCP ranks that run it.
std::vector<bool> GathersQ(const StepPlan& plan, const BatchOptions& options, int32_t shards, int32_t ranks) {
  const size_t n = plan.requests.size();
  if (shards == 1 && !options.mla) return std::vector<bool>(n, false);
  if (options.exchange != ContextExchange::kAuto) {
    return std::vector<bool>(n, options.exchange == ContextExchange::kGatherQ);
  }
  std::vector<cp::ExchangeItem> items;
  for (const RequestStep& step : plan.requests) {
    // By state, never by length: a chunk of a prompt may be one token long.
    items.push_back({.context = step.computed,
                     .tokens = step.tokens,
                     .cut = ranks > 1 && step.prefill && step.tokens >= options.costs.min_tokens_to_cut,
                     .decode = !step.prefill});
  }
  return cp::ChooseGatherQ(items, options.attention,
                           {.shards = shards,
                            .dcp = options.parallel.decode_context_parallel,
                            .pcp_ranks = ranks,
                            .messages = options.messages},
                           options.rates);
}

}  // namespace

StepDeal DealStep(const StepPlan& plan, const BatchOptions& options) {
  const cp::ParallelConfig& parallel = options.parallel;
  StepDeal deal;
  deal.solo = IsSolo(plan, options);
  deal.ranks = deal.solo ? 1 : parallel.prefill_context_parallel;
  // Else over each one's DCP group alone: replicas, or one rank for all.
  deal.over_pcp = !deal.solo && parallel.KvShards() > parallel.decode_context_parallel;
  std::vector<cp::QueryItem> items;
  for (const RequestStep& step : plan.requests) items.push_back({step.computed, step.tokens, !step.prefill});
  deal.dealt = cp::DealQueries(items, options.costs, deal.ranks);
  const int32_t exchanging = deal.over_pcp ? parallel.KvShards() : parallel.decode_context_parallel;
  deal.gathers_q = GathersQ(plan, options, exchanging, deal.ranks);
  return deal;
}

int64_t MostRows(const StepDeal& deal) {
  int64_t most = 0;
  for (const auto& of_rank : deal.dealt) {
    int64_t rows = 0;
    for (const cp::DealtChunk& dealt : of_rank) rows += dealt.chunk.tokens;
    most = std::max(most, rows);
  }
  return most;
}

ContextCounts CountContext(const StepPlan& plan, const StepDeal& deal) {
  ContextCounts counts{.steps = 1, .solo_steps = deal.solo ? 1u : 0u};
  std::vector<int32_t> ranks(plan.requests.size());  // that have chunks of it
  for (const auto& chunks : deal.dealt) {
    for (size_t i = 0; i < chunks.size(); ++i) {
      ranks[chunks[i].item] += i == 0 || chunks[i - 1].item != chunks[i].item;  // they are in the order of the items
    }
  }
  for (size_t i = 0; i < plan.requests.size(); ++i) {
    const RequestStep& step = plan.requests[i];
    (deal.gathers_q[i] ? counts.gather_q_tokens : counts.gather_kv_tokens) += static_cast<uint64_t>(step.tokens);
    if (step.prefill) ++(ranks[i] > 1 ? counts.cut_prefills : counts.whole_prefills);
  }
  return counts;
}

RankBatch MakeRankBatch(const StepPlan& plan, const StepDeal& deal, const RequestTable& table,
                        const cp::ParallelConfig& parallel, const cp::RankCoord& coord) {
  const cp::KvLayout layout = LayoutOf(parallel);
  const int32_t pcp_size = parallel.prefill_context_parallel;
  const int32_t dcp_size = parallel.decode_context_parallel;
  RankBatch batch;
  ForwardBatch& f = batch.forward;
  f.solo = deal.solo;
  const bool pcp_shards = layout.shards > dcp_size;  // each PCP rank has shards of its own
  const bool pcp_exchanges = deal.over_pcp;
  f.local_shards = {coord.kv_shard};
  if (f.solo && pcp_shards) {
    for (int32_t pcp = 1; pcp < pcp_size; ++pcp) f.local_shards.push_back(pcp * dcp_size + coord.dcp);
  }

  for (int32_t pcp = 0; pcp < deal.ranks; ++pcp) {
    const bool own = pcp == coord.pcp;
    std::vector<cp::DealtChunk> order;  // gather-KV rows first
    std::vector<const RequestState*> states;
    int64_t gathered = 0;
    int64_t rows_of_rank = 0;
    for (const bool gather_q : {false, true}) {
      for (const cp::DealtChunk& dealt_chunk : deal.dealt[static_cast<size_t>(pcp)]) {
        const auto& [item, chunk] = dealt_chunk;
        const RequestStep& step = plan.requests[item];
        if (deal.gathers_q[item] != gather_q) continue;
        (gather_q ? f.any_gather_q : f.any_gather_kv) = true;
        const RequestState& state = table.Get(step.handle);
        order.push_back(dealt_chunk);
        states.push_back(&state);
        QuerySegment segment{
            .request = item, .rows = chunk.tokens, .first_position = chunk.first, .block_table = state.block_table};
        if (gather_q && (own || pcp_exchanges)) {
          segment.row0 = gathered + f.gathered_rows;
          f.gather_q.push_back(segment);
          gathered += chunk.tokens;
        }
        if (!gather_q) {
          segment.row0 = rows_of_rank;
          f.new_keys.push_back({pcp, segment});
          if (own) {
            f.gather_kv.push_back(segment);
            f.gather_kv_rows += chunk.tokens;
          }
          const bool known = std::any_of(f.contexts.begin(), f.contexts.end(),
                                         [&](const ForwardBatch::Context& c) { return c.request == item; });
          if (step.computed > 0 && !known) f.contexts.push_back({item, step.computed, state.block_table});
        }
        rows_of_rank += chunk.tokens;
        if (!own) continue;
        for (int64_t x = chunk.first; x < chunk.first + chunk.tokens; ++x) {
          f.token_ids.push_back(state.tokens[static_cast<size_t>(x)]);
          f.positions.push_back(static_cast<int32_t>(x));
          LogitsRow row{.row = f.rows++, .request = item, .position = x};
          row.sample = step.sample && x == step.computed + step.tokens - 1;
          row.prompt_logprob = state.params.prompt_logprobs.has_value() && x + 1 < state.prompt_tokens;
          if (row.sample || row.prompt_logprob || plan.capture_logits) batch.logits.push_back(row);
        }
      }
    }
    if (own || pcp_exchanges) f.gather_q_rows.push_back(gathered);
    f.gathered_rows += gathered;
    f.most_rows = std::max(f.most_rows, rows_of_rank);

    // The caches that this rank fills: its own; working alone, those of all PCP ranks.
    for (int32_t target = 0; target < pcp_size; ++target) {
      if (!f.solo && target != coord.pcp) continue;
      const int32_t shard = pcp_shards ? target * dcp_size + coord.dcp : coord.dcp;
      auto& store = f.stores.emplace_back(ForwardBatch::Store{.source = pcp, .target = target, .slots = {}});
      for (size_t i = 0; i < order.size(); ++i) {
        const cp::Chunk& chunk = order[i].chunk;
        for (int64_t x = chunk.first; x < chunk.first + chunk.tokens; ++x) {
          store.slots.push_back(SlotOn(layout, shard, states[i]->block_table, x));
        }
      }
    }
  }

  for (int32_t shard = 0; shard < layout.shards; ++shard) {
    for (int64_t row = 0; row < f.gather_kv_rows; ++row) {
      f.gather_kv_visible.push_back(
          static_cast<int32_t>(layout.LocalLen(f.positions[static_cast<size_t>(row)] + 1, shard)));
    }
  }
  for (const int32_t shard : f.local_shards) {
    for (const QuerySegment& segment : f.gather_q) {
      for (int64_t x = segment.first_position; x < segment.first_position + segment.rows; ++x) {
        f.gather_q_visible.push_back(static_cast<int32_t>(layout.LocalLen(x + 1, shard)));
      }
    }
  }
  return batch;
}

}  // namespace weft
