#include "weft/cp/exchange_cost.h"

#include <algorithm>
#include <cmath>

namespace weft::cp {
namespace {

constexpr double kFloat = 4;  // queries and partial results are f32
// Keys are read once for so many columns (rows x query heads of a KV head), as the attention kernel tiles them.
constexpr double kColumns = 512;

double PairsOf(const ExchangeItem& item) {
  const auto n = static_cast<double>(item.tokens);
  return n * static_cast<double>(item.context) + n * (n + 1) / 2;
}

// Among how many PCP ranks a request's rows, or rows of other requests like it, are spread.
double SpreadOf(const ExchangeItem& item, const ExchangeGroup& group, int64_t whole_items) {
  if (item.cut) return group.pcp_ranks;
  return static_cast<double>(std::clamp<int64_t>(whole_items, 1, group.pcp_ranks));
}

double KeysOf(const ExchangeItem& item) { return static_cast<double>(item.context + item.tokens); }

// Bytes of `keys` keys read by `rows` rows of `heads` heads.
double ReadBytes(double keys, double rows, double heads, const AttentionShape& shape) {
  const double passes = std::max(1.0, std::ceil(rows * heads / static_cast<double>(shape.kv_heads) / kColumns));
  return keys * static_cast<double>(shape.cached_bytes) * passes;
}

}  // namespace

double GatherKvSeconds(const ExchangeItem& item, const AttentionShape& shape, const ExchangeGroup& group,
                       const MachineRates& rates, int64_t whole_items) {
  const auto heads = static_cast<double>(shape.heads);
  const double spread = SpreadOf(item, group, whole_items);
  const double rows = static_cast<double>(item.tokens) / (item.cut ? spread : 1);
  const double compute =
      PairsOf(item) / spread * heads * 2 * static_cast<double>(shape.k_dim + shape.v_dim) / rates.flop_per_s;
  double attend = compute;
  if (shape.expand_flop == 0) {
    // A cut request's keys are read by every rank, those of a whole one by its own.
    const double read = ReadBytes(KeysOf(item), rows, heads, shape) / (item.cut ? 1 : spread) / rates.read_bytes_per_s;
    attend = std::max(compute, read);
  } else {
    // Expanded keys are written and read as f32 once at least. Where memory is shared each PCP rank expands its part.
    const bool deals = !group.messages && group.pcp_ranks > 1;
    const double share = deals ? group.pcp_ranks : item.cut ? 1 : spread;
    const double bytes = 2 * heads * static_cast<double>(shape.k_dim + shape.v_dim) * kFloat;
    attend += KeysOf(item) / share * (shape.expand_flop / rates.flop_per_s + bytes / rates.read_bytes_per_s);
  }
  if (!group.messages || group.shards == 1) return attend;
  // Every rank packs its part of the context (read and written), and receives the parts of the others while it attends
  // to what has come.
  const double packed = 2 * static_cast<double>(item.context) * static_cast<double>(shape.cached_bytes) / group.shards;
  const double received = static_cast<double>(item.context) * static_cast<double>(shape.cached_bytes) *
                          (1.0 - 1.0 / group.shards) / rates.exchange_bytes_per_s;
  return packed / rates.read_bytes_per_s + std::max(attend, received);
}

double GatherQSeconds(const ExchangeItem& item, const AttentionShape& shape, const ExchangeGroup& group,
                      const MachineRates& rates, int64_t whole_items) {
  const double spread = SpreadOf(item, group, whole_items);
  const auto n = static_cast<double>(item.tokens);
  // Rows that meet on a rank. By itself a PCP rank has a part of a cut request, or all of some.
  const double gathered = group.over_pcp() || !item.cut ? n : n / spread;
  const double often = group.over_pcp() ? 1 : item.cut ? 1 : 1 / spread;  // of this request's like on one rank
  const double group_heads = static_cast<double>(shape.heads) * group.dcp;
  const double pairs = PairsOf(item) * (gathered / n) * often / group.shards;
  const double compute =
      pairs * group_heads * 2 * static_cast<double>(shape.cached_k_dim + shape.cached_v_dim) / rates.flop_per_s;
  const double read =
      ReadBytes(KeysOf(item) / group.shards, gathered, group_heads, shape) * often / rates.read_bytes_per_s;
  const double attend = std::max(compute, read);
  if (group.shards == 1) return attend;

  // Queries of all gathered rows come in; a partial result of each goes out to be merged, one from every shard for each
  // row of one's own.
  const double query = gathered * group_heads * static_cast<double>(shape.cached_k_dim) * kFloat * often;
  const double result = static_cast<double>(shape.cached_v_dim + 1) * kFloat;
  const double partial = gathered * group_heads * result * often;
  const double merged = n / spread * static_cast<double>(shape.heads) * result * group.shards;
  const double copied = (2 * query + partial + merged) / rates.read_bytes_per_s;
  if (!group.messages) return attend + copied;
  const double received = (query + merged) * (1.0 - 1.0 / group.shards);
  return attend + copied + received / rates.exchange_bytes_per_s;
}

std::vector<bool> ChooseGatherQ(std::span<const ExchangeItem> items, const AttentionShape& shape,
                                const ExchangeGroup& group, const MachineRates& rates) {
  std::vector<bool> gather_q(items.size());
  if (rates.flop_per_s <= 0 || rates.read_bytes_per_s <= 0 || (group.messages && rates.exchange_bytes_per_s <= 0)) {
    for (size_t i = 0; i < items.size(); ++i) gather_q[i] = items[i].decode;
    return gather_q;
  }
  const auto whole = std::ranges::count_if(items, [](const ExchangeItem& item) { return !item.cut; });
  double all_kv = 0, all_q = 0, mixed = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    const double kv = GatherKvSeconds(items[i], shape, group, rates, whole);
    const double q = GatherQSeconds(items[i], shape, group, rates, whole);
    gather_q[i] = q < kv;
    all_kv += kv;
    all_q += q;
    mixed += std::min(kv, q);
  }
  // Keys have one exchange; queries go out and results come back.
  const double kv_latency = group.shards > 1 ? rates.latency_s : 0;
  const double q_latency = 2 * kv_latency;
  all_kv += kv_latency;
  all_q += q_latency;
  mixed += kv_latency + q_latency;
  if (all_kv <= all_q && all_kv <= mixed) {
    gather_q.assign(items.size(), false);
  } else if (all_q <= mixed) {
    gather_q.assign(items.size(), true);
  }
  return gather_q;
}

int64_t MinTokensToCut(const MachineRates& rates, double bytes_per_weight, double layer_flop_per_token,
                       int32_t pcp_ranks, bool solo) {
  // Rates are measured on a machine that may be busy: whatever they are, it stays within reason.
  constexpr double kMost = 192;
  if (rates.flop_per_s <= 0 || rates.read_bytes_per_s <= 0) return kMinTokensToCut;
  const double balanced = bytes_per_weight / 2 * rates.flop_per_s / rates.read_bytes_per_s;
  double tokens = 2 * balanced;
  if (solo) {
    tokens = 4 * pcp_ranks * balanced;
  } else {
    // Cut, n tokens save (1 - 1 / P) of their time.
    const double saved_a_token = layer_flop_per_token / rates.flop_per_s * (1 - 1.0 / pcp_ranks);
    tokens = std::max(tokens, 2 * rates.latency_s / saved_a_token);
  }
  return static_cast<int64_t>(std::ceil(std::clamp(tokens, 2.0, kMost)));
}

}  // namespace weft::cp
