// Attention for many columns; attention.cc says how. Included once per Highway target.
#if defined(WEFT_KERNELS_CPU_ATTENTION_TILED_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WEFT_KERNELS_CPU_ATTENTION_TILED_INL_H_
#undef WEFT_KERNELS_CPU_ATTENTION_TILED_INL_H_
#else
#define WEFT_KERNELS_CPU_ATTENTION_TILED_INL_H_
#endif

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "hwy/highway.h"
#include "weft/kernels/cpu/attention_plan.h"
#include "weft/kernels/cpu/scratch.h"
#include "weft/kernels/cpu/simd-inl.h"
#include "weft/kernels/table.h"

HWY_BEFORE_NAMESPACE();
namespace weft {
namespace HWY_NAMESPACE {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Keys of a tile: a panel's scores (kTileCols x kKeyTile floats) are to stay in L1 beside its queries.
constexpr int64_t kKeyTile = 128;

// Columns of a piece. The queries and sums of all its columns, 4 (k_dim + v_dim) bytes each, are to stay in L2 beside
// the tile of keys and values; but unpacking that tile, once for all columns, costs as much as the arithmetic of some 8
// of them, so it wants hundreds.
constexpr int64_t kMaxCols = 512;
inline int64_t MaxColumns(const AttentionArgs& args) {
  static const int64_t budget = [] {
    const int64_t l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return (l2 > 0 ? l2 : int64_t{512} << 10) * 2 / 5;
  }();
  const int64_t cols = budget / (4 * (args.k_dim + args.v_dim)) / kTileCols * kTileCols;
  return std::clamp<int64_t>(cols, 64, kMaxCols);
}

// The columns of one piece and where their results go.
struct PieceView {
  PieceView(const AttentionArgs& args, const cpu::AttentionPiece& piece_in, float* outs, float* lses)
      : task(args.tasks[static_cast<size_t>(piece_in.task)]),
        piece(piece_in),
        group(args.q_heads / args.kv_heads),
        cols(piece.col1 - piece.col0),
        k_dim(args.k_dim),
        v_dim(args.v_dim),
        partial_out(piece.partial < 0 ? nullptr : outs + piece.partial * args.v_dim),
        partial_lse(piece.partial < 0 ? nullptr : lses + piece.partial) {}

  int64_t Row(int64_t c) const { return (piece.col0 + c) / group; }
  int64_t Head(int64_t c) const { return piece.kv_head * group + (piece.col0 + c) % group; }
  const float* Query(int64_t c) const { return task.q + Row(c) * task.q_stride + Head(c) * k_dim; }
  float* Out(int64_t c) const {
    return partial_out != nullptr ? partial_out + c * v_dim : task.out + Row(c) * task.out_stride + Head(c) * v_dim;
  }
  // From the maximum (log2 units) and the sum of 2^(score - maximum).
  void SetLse(int64_t c, float largest, float sum) const {
    float* lse = partial_lse != nullptr ? partial_lse + c
                 : task.lse != nullptr  ? task.lse + Row(c) * task.lse_stride + Head(c)
                                        : nullptr;
    if (lse == nullptr) return;
    *lse = sum > 0 ? static_cast<float>(largest * kLn2 + std::log(static_cast<double>(sum))) : -kInfinity;
  }

  // Calls fn(kv, lo, hi) for the keys [lo, hi) of each shard that belong to the piece.
  template <class Fn>
  void ForShards(const Fn& fn) const {
    int64_t before = 0;
    for (const KvPages& kv : task.kv) {
      const int64_t keys = kv.visible[Row(cols - 1)];
      const int64_t lo = std::clamp<int64_t>(piece.key0 - before, 0, keys);
      const int64_t hi = std::clamp<int64_t>(piece.key1 - before, 0, keys);
      before += keys;
      if (lo < hi) fn(kv, lo, hi);
    }
  }

  const AttentionTask& task;
  const cpu::AttentionPiece& piece;
  int64_t group;
  int64_t cols;
  int64_t k_dim;
  int64_t v_dim;
  float* partial_out;
  float* partial_lse;
};

// The keys, or the values, of one KV head on one shard: element d of a row lies at block * block_stride + head_offset +
// row * row_stride + d of `data`.
struct HeadRows {
  const void* data;
  int64_t block_stride;
  int64_t head_offset;
  int64_t row_stride;
  int64_t dim;
};

HWY_INLINE HeadRows KeyRows(const PieceView& view, const KvPages& kv) {
  return {kv.k, kv.k_block_stride, view.piece.kv_head * kv.k_head_stride,
          kv.k_row_stride != 0 ? kv.k_row_stride : view.k_dim, view.k_dim};
}
HWY_INLINE HeadRows ValueRows(const PieceView& view, const KvPages& kv) {
  return {kv.v, kv.v_block_stride, view.piece.kv_head * kv.v_head_stride,
          kv.v_row_stride != 0 ? kv.v_row_stride : view.v_dim, view.v_dim};
}
// Whether each value is the beginning of its key, so that it need not be read again.
HWY_INLINE bool ValuesAreKeys(const HeadRows& k, const HeadRows& v) {
  return v.data == k.data && v.block_stride == k.block_stride && v.head_offset == k.head_offset &&
         v.row_stride == k.row_stride && v.dim <= k.dim;
}

// Calls fn(i, index) for the keys key0 + i, i < keys: `index` is the element at which the key's row begins. One
// division a tile: a 64-bit one takes as long as a row's arithmetic.
template <class Fn>
HWY_INLINE void ForKeys(const KvPages& kv, const HeadRows& rows, int64_t key0, int64_t keys, const Fn& fn) {
  if (kv.block_table == nullptr) {
    for (int64_t i = 0; i < keys; ++i) fn(i, rows.head_offset + (key0 + i) * rows.row_stride);
    return;
  }
  const int32_t* block = kv.block_table + key0 / kv.block_tokens;
  int64_t offset = key0 % kv.block_tokens;
  for (int64_t i = 0; i < keys; ++block, offset = 0) {
    const int64_t run = std::min(keys - i, kv.block_tokens - offset);
    const int64_t index = *block * rows.block_stride + rows.head_offset + offset * rows.row_stride;
    for (int64_t r = 0; r < run; ++r) fn(i + r, index + r * rows.row_stride);
    i += run;
  }
}

// Dimensions beyond kDepth lie in further blocks of the tile, kKeyTile * kRowStride floats each.
constexpr int64_t kTileBlock = kKeyTile * kRowStride;

template <typename T>
void UnpackRows(const KvPages& kv, const HeadRows& rows, int64_t key0, int64_t keys, float* to) {
  ForKeys(kv, rows, key0, keys, [&](int64_t i, int64_t index) HWY_ATTR {
    const T* from = static_cast<const T*>(rows.data) + index;
    for (int64_t d = 0; d < rows.dim; d += kDepth) {
      ToFloats(from + d, std::min(kDepth, rows.dim - d), to + d / kDepth * kTileBlock + i * kRowStride);
    }
  });
}

HWY_INLINE void PrefetchRows(const KvPages& kv, const HeadRows& rows, int64_t key0, int64_t keys) {
  const int64_t element = static_cast<int64_t>(SizeOf(kv.dtype));
  ForKeys(kv, rows, key0, keys, [&](int64_t, int64_t index) HWY_ATTR {
    const char* row = static_cast<const char*>(rows.data) + index * element;
    for (int64_t b = 0; b < rows.dim * element; b += 64) __builtin_prefetch(row + b, 0, 2);
  });
}

struct TiledState {
  float* q;      // [k_dim, width]
  float* o;      // [v_dim, width]
  float* m;      // [width] running maximum
  float* l;      // [width] running sum
  int32_t* vis;  // [width] keys visible in the current shard
};

// Scores of `keys` keys x kVectors vectors of columns -> probabilities relative to the new maxima; alpha = what earlier
// sums are to be multiplied by. Keys [0, full) are visible to all columns.
template <int kVectors>
HWY_NOINLINE void SoftmaxPanel(float* HWY_RESTRICT s, int64_t keys, int64_t full, int64_t key0, const TiledState& state,
                               float* HWY_RESTRICT alpha) {
  const DF d;
  const DI di;
  constexpr int64_t kWidth = kVectors * kLanes;
  VF top[2][kVectors];
  for (int v = 0; v < kVectors; ++v) top[0][v] = top[1][v] = hn::Load(d, state.m + v * kLanes);
  int64_t key = 0;
  for (; key + 2 <= full; key += 2) {
#pragma GCC unroll 2
    for (int u = 0; u < 2; ++u) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        top[u][v] = hn::Max(top[u][v], hn::Load(d, s + (key + u) * kWidth + v * kLanes));
      }
    }
  }
  for (; key < full; ++key) {
    for (int v = 0; v < kVectors; ++v) top[0][v] = hn::Max(top[0][v], hn::Load(d, s + key * kWidth + v * kLanes));
  }
  for (; key < keys; ++key) {
    for (int v = 0; v < kVectors; ++v) {
      const auto seen = hn::Gt(hn::Load(di, state.vis + v * kLanes), hn::Set(di, static_cast<int32_t>(key0 + key)));
      float* at = s + key * kWidth + v * kLanes;
      const VF masked = hn::IfThenElse(hn::RebindMask(d, seen), hn::Load(d, at), hn::Set(d, -kInfinity));
      hn::Store(masked, d, at);
      top[0][v] = hn::Max(top[0][v], masked);
    }
  }
  VF base[kVectors];
  VF sum[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const VF largest = hn::Max(top[0][v], top[1][v]);
    // A column that has seen nothing yet keeps -inf as its maximum; 0 instead makes exp2(-inf - 0) = 0, not a NaN.
    base[v] = hn::IfThenZeroElse(hn::Eq(largest, hn::Set(d, -kInfinity)), largest);
    hn::Store(Exp2(d, hn::Sub(hn::Load(d, state.m + v * kLanes), base[v])), d, alpha + v * kLanes);
    hn::Store(largest, d, state.m + v * kLanes);
    sum[v] = hn::Zero(d);
  }
  for (key = 0; key < keys; ++key) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* at = s + key * kWidth + v * kLanes;
      const VF p = Exp2(d, hn::Sub(hn::Load(d, at), base[v]));
      hn::Store(p, d, at);
      sum[v] = hn::Add(sum[v], p);
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    float* l = state.l + v * kLanes;
    hn::Store(hn::MulAdd(hn::Load(d, l), hn::Load(d, alpha + v * kLanes), sum[v]), d, l);
  }
}

// One panel of columns against the unpacked keys [key0, key0 + keys) of a shard.
template <int kVectors>
void AttendPanel(const PieceView& view, const TiledState& state, const float* k_tile, const float* v_tile, int64_t key0,
                 int64_t keys, int64_t full, float* HWY_RESTRICT s) {
  constexpr int64_t kWidth = kVectors * kLanes;
  const Strips key_strips(keys);
  int64_t key = 0;
  for (int64_t strip = 0; strip < key_strips.count; ++strip) {
    const int64_t height = key_strips.HeightOf(strip);
    const TileFn tile = TileOf<kVectors, kRowStride, 1>(height);
    for (int64_t d = 0; d < view.k_dim; d += kDepth) {
      tile(k_tile + d / kDepth * kTileBlock + key * kRowStride, state.q + d * kWidth, std::min(kDepth, view.k_dim - d),
           s + key * kWidth, kWidth, d == 0 ? TileStore::kSet : TileStore::kAdd, nullptr);
    }
    key += height;
  }
  HWY_ALIGN float alpha[kWidth];
  SoftmaxPanel<kVectors>(s, keys, full, key0, state, alpha);
  for (int64_t block = 0; block < view.v_dim; block += kDepth) {
    const Strips strips(std::min(kDepth, view.v_dim - block));
    int64_t d = 0;
    for (int64_t strip = 0; strip < strips.count; ++strip) {
      const int64_t height = strips.HeightOf(strip);
      TileOf<kVectors, 1, kRowStride>(height)(v_tile + block / kDepth * kTileBlock + d, s, keys,
                                              state.o + (block + d) * kWidth, kWidth, TileStore::kScaleAdd, alpha);
      d += height;
    }
  }
}

HWY_INLINE void PrefetchFloats(const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(from + i, 1);
}

// to[d * width + c] = query c, element d, scaled; missing columns are 0.
HWY_NOINLINE void PackQueries(const PieceView& view, int64_t c0, int64_t count, int64_t width, float scale, float* to) {
  int64_t c = 0;
  for (; c + 4 <= count; c += 4) {
    const float* rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = view.Query(c0 + c + i);
    for (int64_t i = c + 4; i < std::min(c + 8, count); ++i) PrefetchFloats(view.Query(c0 + i), view.k_dim);
    int64_t d = 0;
    for (; d + 4 <= view.k_dim; d += 4) {
      const float* from[4] = {rows[0] + d, rows[1] + d, rows[2] + d, rows[3] + d};
      Transpose4x4(from, to + d * width + c, width, scale);
    }
    for (; d < view.k_dim; ++d) {
      for (int i = 0; i < 4; ++i) to[d * width + c + i] = rows[i][d] * scale;
    }
  }
  for (; c < width; ++c) {
    const float* row = c < count ? view.Query(c0 + c) : nullptr;
    for (int64_t d = 0; d < view.k_dim; ++d) to[d * width + c] = row != nullptr ? row[d] * scale : 0.0f;
  }
}

HWY_NOINLINE void StoreColumns(const PieceView& view, int64_t c0, int64_t count, int64_t width,
                               const TiledState& state) {
  int64_t c = 0;
  for (int64_t i = 0; i < width; ++i) {
    // Dividing the columns where they lie side by side; a column that saw no key is 0 already.
    if (i < count) view.SetLse(c0 + i, state.m[i], state.l[i]);
    state.l[i] = state.l[i] > 0 ? 1.0f / state.l[i] : 0.0f;
  }
  for (int64_t d = 0; d < view.v_dim; ++d) {
    for (int64_t i = 0; i < width; i += kLanes) {
      float* at = state.o + d * width + i;
      hn::Store(hn::Mul(hn::Load(DF(), at), hn::Load(DF(), state.l + i)), DF(), at);
    }
  }
  for (; c + 4 <= count; c += 4) {
    for (int64_t i = c + 4; i < std::min(c + 8, count); ++i) PrefetchFloats(view.Out(c0 + i), view.v_dim);
    int64_t d = 0;
    for (; d + 4 <= view.v_dim; d += 4) {
      const float* from[4];
      HWY_ALIGN float block[16];
      for (int i = 0; i < 4; ++i) from[i] = state.o + (d + i) * width + c;
      Transpose4x4(from, block, 4, 1.0f);
      for (int i = 0; i < 4; ++i) std::memcpy(view.Out(c0 + c + i) + d, block + 4 * i, 4 * sizeof(float));
    }
    for (; d < view.v_dim; ++d) {
      for (int i = 0; i < 4; ++i) view.Out(c0 + c + i)[d] = state.o[d * width + c + i];
    }
  }
  for (; c < count; ++c) {
    float* out = view.Out(c0 + c);
    for (int64_t d = 0; d < view.v_dim; ++d) out[d] = state.o[d * width + c];
  }
}

void TilePiece(const AttentionArgs& args, const PieceView& view) {
  constexpr int64_t kMaxPanels = kMaxCols / kTileCols + 1;
  const int64_t panels = (view.cols + kTileCols - 1) / kTileCols;
  const int64_t k_blocks = (view.k_dim + kDepth - 1) / kDepth;
  const int64_t v_blocks = (view.v_dim + kDepth - 1) / kDepth;
  const int64_t panel_floats = kTileCols * (view.k_dim + view.v_dim + 3);
  float* memory = cpu::ScratchOf<float>(
      cpu::ScratchSlot::kWork, (k_blocks + v_blocks) * kTileBlock + kKeyTile * kTileCols + panels * panel_floats);
  float* k_tile = memory;
  float* v_tile = k_tile + k_blocks * kTileBlock;
  float* s = v_tile + v_blocks * kTileBlock;
  float* next = s + kKeyTile * kTileCols;

  TiledState states[kMaxPanels];
  int64_t counts[kMaxPanels];
  int64_t widths[kMaxPanels];
  for (int64_t p = 0; p < panels; ++p) {
    TiledState& state = states[p];
    counts[p] = std::min(kTileCols, view.cols - p * kTileCols);
    widths[p] = counts[p] <= kLanes ? kLanes : kTileCols;
    state.q = next;
    state.o = state.q + view.k_dim * kTileCols;
    state.m = state.o + view.v_dim * kTileCols;
    state.l = state.m + kTileCols;
    state.vis = reinterpret_cast<int32_t*>(state.l + kTileCols);
    next += panel_floats;
    PackQueries(view, p * kTileCols, counts[p], widths[p], args.scale * kLog2E, state.q);
    std::fill(state.o, state.o + view.v_dim * widths[p], 0.0f);
    std::fill(state.m, state.m + widths[p], -kInfinity);
    std::fill(state.l, state.l + widths[p], 0.0f);
  }

  view.ForShards([&](const KvPages& kv, int64_t lo, int64_t hi) HWY_ATTR {
    for (int64_t p = 0; p < panels; ++p) {
      // The missing columns see what the last one sees, so that they never make a block a masked one.
      for (int64_t c = 0; c < widths[p]; ++c) {
        states[p].vis[c] = kv.visible[view.Row(p * kTileCols + std::min(c, counts[p] - 1))];
      }
    }
    const HeadRows k_rows = KeyRows(view, kv);
    const HeadRows v_rows = ValueRows(view, kv);
    const bool shared = ValuesAreKeys(k_rows, v_rows);
    const float* values = shared ? k_tile : v_tile;
    for (int64_t key0 = lo; key0 < hi; key0 += kKeyTile) {
      const int64_t keys = std::min(kKeyTile, hi - key0);
      if (kv.dtype == DType::kBF16) {
        UnpackRows<bf16>(kv, k_rows, key0, keys, k_tile);
        if (!shared) UnpackRows<bf16>(kv, v_rows, key0, keys, v_tile);
      } else {
        UnpackRows<float>(kv, k_rows, key0, keys, k_tile);
        if (!shared) UnpackRows<float>(kv, v_rows, key0, keys, v_tile);
      }
      const int64_t next_keys = std::min(kKeyTile, hi - key0 - keys);
      for (int64_t p = 0; p < panels; ++p) {
        const TiledState& state = states[p];
        // Each panel fetches its share of the next tile from memory into L2.
        const int64_t fetched = next_keys * p / panels;
        const int64_t to_fetch = next_keys * (p + 1) / panels - fetched;
        if (to_fetch > 0) {
          PrefetchRows(kv, k_rows, key0 + keys + fetched, to_fetch);
          if (!shared) PrefetchRows(kv, v_rows, key0 + keys + fetched, to_fetch);
        }
        // Visible counts never fall from row to row: the first column sees the least, the last one the most.
        const int64_t seen = std::min<int64_t>(keys, state.vis[widths[p] - 1] - key0);
        if (seen <= 0) continue;
        const int64_t full = std::clamp<int64_t>(state.vis[0] - key0, 0, seen);
        if (widths[p] == kTileCols) {
          AttendPanel<2>(view, state, k_tile, values, key0, seen, full, s);
        } else {
          AttendPanel<1>(view, state, k_tile, values, key0, seen, full, s);
        }
      }
    }
  });
  for (int64_t p = 0; p < panels; ++p) StoreColumns(view, p * kTileCols, counts[p], widths[p], states[p]);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace weft
HWY_AFTER_NAMESPACE();

#endif
