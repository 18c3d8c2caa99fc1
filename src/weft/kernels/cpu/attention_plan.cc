#include "weft/kernels/cpu/attention_plan.h"

#include <algorithm>

namespace weft::cpu {
namespace {

// Keys of a piece that are worth a partial result of their own and its merging.
constexpr int64_t kLeastKeys = 512;
// No tile is made narrower than this for the sake of balance: the keys are unpacked once for each tile.
constexpr int64_t kLeastCols = 64;

int64_t KeysOf(const AttentionTask& task, int64_t row) {
  int64_t keys = 0;
  for (const KvPages& kv : task.kv) keys += kv.visible[row];
  return keys;
}

}  // namespace

void PlanAttention(const AttentionArgs& args, int threads, int64_t max_cols, int64_t key_tile, AttentionPlan& plan) {
  plan.pieces.clear();
  plan.joins.clear();
  plan.partials = 0;
  const int64_t group = args.q_heads / args.kv_heads;
  auto tiles_of = [&](int64_t cols) {
    int64_t tiles = 0;
    for (const AttentionTask& task : args.tasks) tiles += (task.rows * group + cols - 1) / cols * args.kv_heads;
    return tiles;
  };
  int64_t tile_cols = max_cols;
  while (threads > 1 && tile_cols / 2 >= kLeastCols && tiles_of(tile_cols) < int64_t{threads} * 4) tile_cols /= 2;

  double total = 0;
  for (size_t t = 0; t < args.tasks.size(); ++t) {
    const AttentionTask& task = args.tasks[t];
    const int64_t cols = task.rows * group;
    const int64_t tiles = (cols + tile_cols - 1) / tile_cols;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      AttentionPiece piece;
      piece.task = static_cast<int32_t>(t);
      piece.col0 = tile * tile_cols;
      piece.col1 = std::min(piece.col0 + tile_cols, cols);
      piece.key1 = KeysOf(task, (piece.col1 - 1) / group);
      // Columns that are few cost the reading of the keys, many cost the arithmetic over the keys that each sees.
      const double seen = 0.5 * static_cast<double>(piece.key1 + KeysOf(task, piece.col0 / group));
      piece.cost = (seen + 1) * static_cast<double>(std::max<int64_t>(piece.col1 - piece.col0, 8));
      for (int32_t head = 0; head < args.kv_heads; ++head) {
        piece.kv_head = head;
        plan.pieces.push_back(piece);
        total += piece.cost;
      }
    }
  }
  // One piece may not outlast what the others keep the threads busy with.
  const double most = total / (threads * 4.0);
  const size_t whole = plan.pieces.size();
  for (size_t i = 0; threads > 1 && i < whole; ++i) {
    const AttentionPiece piece = plan.pieces[i];
    const int64_t keys = piece.key1;
    const int64_t wanted = std::min(static_cast<int64_t>(piece.cost / most) + 1, keys / kLeastKeys);
    if (piece.cost <= most * 1.01 || wanted < 2) continue;
    const int64_t each = ((keys + wanted - 1) / wanted + key_tile - 1) / key_tile * key_tile;
    const int64_t parts = (keys + each - 1) / each;
    if (parts < 2) continue;
    const int64_t cols = piece.col1 - piece.col0;
    plan.joins.push_back({.task = piece.task,
                          .kv_head = piece.kv_head,
                          .col0 = piece.col0,
                          .col1 = piece.col1,
                          .first = plan.partials,
                          .parts = parts});
    for (int64_t part = 0; part < parts; ++part) {
      AttentionPiece cut = piece;
      cut.key0 = part * each;
      cut.key1 = std::min(cut.key0 + each, keys);
      cut.partial = plan.partials + part * cols;
      cut.cost = piece.cost / static_cast<double>(parts);
      if (part == 0) {
        plan.pieces[i] = cut;
      } else {
        plan.pieces.push_back(cut);
      }
    }
    plan.partials += parts * cols;
  }
  std::stable_sort(plan.pieces.begin(), plan.pieces.end(),
                   [](const AttentionPiece& a, const AttentionPiece& b) { return a.cost > b.cost; });
}

}  // namespace weft::cpu
