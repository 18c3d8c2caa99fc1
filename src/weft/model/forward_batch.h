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
  int64_t row0 = 0;                      // first row in this rank's batch
  int64_t rows = 0;                      // >= 1
  int64_t first_position = 0;            // global position of row0
  std::span<const int32_t> block_table;  // virtual blocks of the request
};

struct ForwardBatch {
  // Prefill rows come first, then decode rows. Prefill rows differ between PCP ranks; decode rows are on all of them.
  int64_t rows = 0;
  int64_t prefill_rows = 0;
  std::vector<int32_t> token_ids;  // [rows]
  std::vector<int32_t> positions;  // [rows]
  std::vector<QuerySegment> prefill;
  std::vector<QuerySegment> decode;

  // Some rank has prefill rows in this step: then all take part in the exchanges of prefill.
  bool any_prefill = false;
  bool any_decode = false;

  // Slots on this rank's KV shard (-1: another shard owns the row) of the prefill rows of each PCP peer, in the order
  // of that peer's batch: [pcp][peer's prefill rows]; and of the decode rows: [rows - prefill_rows].
  std::vector<std::vector<int64_t>> prefill_slots;
  std::vector<int64_t> decode_slots;

  // Keys visible to each row on each KV shard: [shards, rows], cp::KvLayout::LocalLen(position + 1, shard).
  std::vector<int32_t> visible;
};

}  // namespace weft
