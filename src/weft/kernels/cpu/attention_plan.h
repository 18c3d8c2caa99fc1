#pragma once
// How an attention call is cut into pieces for the threads: the plain half of attention.cc.
//
// The query rows of a task and the `group` query heads that share a KV head form the columns of one problem: column c
// is row c / group, head c % group of the group. A piece is a tile of columns of one KV head and a range of its keys.

#include <cstdint>
#include <vector>

#include "weft/kernels/table.h"

namespace weft::cpu {

struct AttentionPiece {
  int32_t task = 0;
  int32_t kv_head = 0;
  int64_t col0 = 0;
  int64_t col1 = 0;
  // Keys [key0, key1), counted through the shards one after another, of those that the piece's last row sees.
  int64_t key0 = 0;
  int64_t key1 = 0;
  // Where the keys of a tile of columns are split over several pieces: the first of its col1 - col0 partial results.
  int64_t partial = -1;
  double cost = 0;
};

// Partial results to be merged: those of column c of part i are number first + i * cols + c.
struct AttentionJoin {
  int32_t task = 0;
  int32_t kv_head = 0;
  int64_t col0 = 0;
  int64_t col1 = 0;
  int64_t first = 0;
  int64_t parts = 0;
};

struct AttentionPlan {
  std::vector<AttentionPiece> pieces;  // the longest first
  std::vector<AttentionJoin> joins;
  int64_t partials = 0;
};

// Fills `plan`, whose memory is reused. Tiles have at most `max_cols` columns; keys are split at multiples of
// `key_tile`, and only where the pieces would otherwise not keep `threads` threads busy to the end.
void PlanAttention(const AttentionArgs& args, int threads, int64_t max_cols, int64_t key_tile, AttentionPlan& plan);

}  // namespace weft::cpu
