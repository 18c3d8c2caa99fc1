#pragma once
// What one rank's forward pass works on in one step: query rows, where their keys and values are to be stored, and what
// each of them may see. Derived from the global StepPlan by runner/; immutable during the step.

#include <cstdint>
#include <span>
#include <vector>

#include "weft/kernels/table.h"

namespace weft {

// Consecutive query rows of one request.
struct QuerySegment {
  size_t request = 0;                    // index into StepPlan::requests
  int64_t row0 = 0;                      // first row
  int64_t rows = 0;                      // >= 1
  int64_t first_position = 0;            // global position of row0
  std::span<const int32_t> block_table;  // virtual blocks of the request
};

// Every row of the step is on one PCP rank (and on all TP ranks of it). How a row meets the keys of all KV shards:
//   gather-KV: its rank reads the keys of every shard (in place where ranks share memory);
//   gather-Q:  its query goes to the rank of every shard, which attends to its own keys; the partial results come back
//              and are merged. Ranks of a DCP group, which hold different heads of the same row, read a key once then.
struct ForwardBatch {
  // Gather-KV rows come first, then gather-Q rows.
  int64_t rows = 0;
  int64_t gather_kv_rows = 0;
  int64_t most_rows = 0;           // of any rank that takes part in the step
  bool router_margins = false;     // Transformer::router_margins are wanted
  std::vector<int32_t> token_ids;  // [rows]
  std::vector<int32_t> positions;  // [rows]

  std::vector<QuerySegment> gather_kv;  // of this rank
  // The gather-Q segments of all PCP ranks among the exchanging ones, rank by rank; row0 counts within the gathered
  // rows.
  std::vector<QuerySegment> gather_q;
  std::vector<int64_t> gather_q_rows;  // [PCP ranks that exchange] gather-Q rows of each
  int64_t gathered_rows = 0;           // their sum

  // Some rank of the step has such rows: then all take part in their exchange.
  bool any_gather_kv = false;
  bool any_gather_q = false;

  // PCP rank 0 works alone, for all: on the KV caches of every PCP rank, and with everybody's threads (Transformer says
  // when that is possible). The exchange of gather-Q rows is with the DCP group only.
  bool solo = false;
  // The KV shards whose keys this rank answers for in gather-Q: its own; working alone, those of all PCP ranks.
  std::vector<int32_t> local_shards;

  // The gather-KV rows of all PCP ranks that run the step, for ranks that exchange the step's new keys themselves and
  // not through their caches (see ContextAttention): rank by rank; row0 counts within that rank's rows.
  struct NewKeys {
    int32_t pcp = 0;
    QuerySegment segment;
  };
  std::vector<NewKeys> new_keys;
  // The requests among them that have keys from earlier steps: how many.
  struct Context {
    size_t request = 0;  // index into StepPlan::requests
    int64_t tokens = 0;  // >= 1
    std::span<const int32_t> block_table;
  };
  std::vector<Context> contexts;

  // Keys and values to be stored: the rows that PCP rank `source` computed, into the KV cache of PCP rank `target`.
  struct Store {
    int32_t source = 0;
    int32_t target = 0;
    std::vector<int64_t> slots;  // [rows of source's batch] -1: not in this cache
  };
  std::vector<Store> stores;

  // Keys visible to a row on a KV shard, cp::KvLayout::LocalLen(position + 1, shard):
  std::vector<int32_t> gather_kv_visible;  // [shards, gather_kv_rows] of this rank's rows
  std::vector<int32_t> gather_q_visible;   // [local shards, gathered rows]
};

}  // namespace weft
