#pragma once
// Gather-Q or gather-KV: what either would cost a request in a step, from the bytes that it moves and the work that it
// makes, at the rates of the machine. Plain arithmetic, so that ranks with the same numbers choose alike.
//
//   gather-KV: the rows of a rank attend, with its own heads, to the keys of all shards.
//   gather-Q:  a rank attends to the keys of its own shard with the rows of all ranks and the heads of its DCP group.
//
// The work of attention is the same where the rows of a request are spread evenly: what one shares out by rows the
// other shares out by keys. They differ in what is read (all keys on every rank, or each key once), in what is moved
// (keys, or queries and partial results), in how well the work of few rows is spread, and with MLA in the form of the
// keys (expanded for gather-KV, which costs work for each key; absorbed for gather-Q, which costs more for each pair).

#include <cstdint>
#include <span>
#include <vector>

namespace weft::cp {

// Of one rank.
struct MachineRates {
  double flop_per_s = 0;            // prefill attention; 0: not known, then decode rows gather Q and others KV
  double read_bytes_per_s = 0;      // memory
  double exchange_bytes_per_s = 0;  // received from other processes
  double latency_s = 0;             // of one exchange of the group
  friend bool operator==(const MachineRates&, const MachineRates&) = default;
};

// Attention of one layer on one rank.
struct AttentionShape {
  int64_t heads = 1;     // query heads of the rank
  int64_t kv_heads = 1;  // of the rank, as the cache has them
  int64_t k_dim = 0;     // of a head, as gather-KV rows attend to it
  int64_t v_dim = 0;
  int64_t cached_k_dim = 0;  // as gather-Q rows do; other than the above with MLA
  int64_t cached_v_dim = 0;
  int64_t cached_bytes = 0;  // of a token's keys and values in the rank's cache
  double expand_flop = 0;    // to make the keys and values of one token for gather-KV; 0: they are in the cache
};

// Among whom a step exchanges.
struct ExchangeGroup {
  int32_t shards = 1;     // KV shards that do
  int32_t dcp = 1;        // of them on one PCP rank
  int32_t pcp_ranks = 1;  // over which the step's rows are dealt
  bool messages = false;  // keys of others come in messages; else they are read in place

  // Gather-Q rows of all PCP ranks meet on every shard; else each PCP rank, with its DCP group, works by itself.
  bool over_pcp() const { return shards > dcp; }
};

// One request in a step.
struct ExchangeItem {
  int64_t context = 0;  // tokens whose keys are in the cache already
  int64_t tokens = 1;   // rows
  bool cut = false;     // its rows are on all PCP ranks; else on one
  bool decode = false;
};

// Seconds that a layer of this request takes on the rank that takes longest, without the latency of the exchange, which
// is the step's. `whole_items`: so many requests of the step are not cut, and spread over the PCP ranks.
double GatherKvSeconds(const ExchangeItem& item, const AttentionShape& shape, const ExchangeGroup& group,
                       const MachineRates& rates, int64_t whole_items = 1);
double GatherQSeconds(const ExchangeItem& item, const AttentionShape& shape, const ExchangeGroup& group,
                      const MachineRates& rates, int64_t whole_items = 1);

// Element i: whether items[i] gathers Q. The cheaper one for each, unless doing both in one step costs more than it
// gains: each kind of exchange has its latency in every layer. Equal costs gather KV.
std::vector<bool> ChooseGatherQ(std::span<const ExchangeItem> items, const AttentionShape& shape,
                                const ExchangeGroup& group, const MachineRates& rates);

// What MinTokensToCut gives while no rates are known.
inline constexpr int64_t kMinTokensToCut = 48;

// From how many new tokens on a prompt gains by being cut over `pcp_ranks` ranks (--pcp-min-tokens auto).
//   A matrix product of m rows takes the time to read its weights up to m0 = bytes_per_weight / 2 * flop / read rows,
//   and m times as long as a row's multiplications beyond. `solo`: a step that is not cut is run by one rank with the
//   threads of all: as fast, and it reads the weights once, not once a rank. Then each rank of a cut prompt is to have
//   4 m0 rows, so that reading is hidden behind arithmetic (docs/performance.md has the measurement). Otherwise an
//   uncut prompt has the threads of one rank alone: 2 m0 rows are enough, where the time saved outweighs the exchanges
//   of a layer of `layer_flop_per_token` (two of them, of latency_s each).
// At least 2 tokens; kMinTokensToCut where no rates are known.
int64_t MinTokensToCut(const MachineRates& rates, double bytes_per_weight, double layer_flop_per_token,
                       int32_t pcp_ranks, bool solo);

}  // namespace weft::cp
