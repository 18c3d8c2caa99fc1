// Attention for few columns (decode); attention.cc says how. Included once per Highway target.
#if defined(WEFT_KERNELS_CPU_ATTENTION_STREAM_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WEFT_KERNELS_CPU_ATTENTION_STREAM_INL_H_
#undef WEFT_KERNELS_CPU_ATTENTION_STREAM_INL_H_
#else
#define WEFT_KERNELS_CPU_ATTENTION_STREAM_INL_H_
#endif

#include <algorithm>
#include <type_traits>

#include "hwy/highway.h"
#include "weft/kernels/cpu/attention_tiled-inl.h"
#include "weft/kernels/cpu/scratch.h"
#include "weft/kernels/cpu/simd-inl.h"
#include "weft/kernels/table.h"

HWY_BEFORE_NAMESPACE();
namespace weft {
namespace HWY_NAMESPACE {
namespace {

// Beyond this many columns the arithmetic along the rows costs more than unpacking: with 16 registers a row is unpacked
// for every 2 columns anew, and each score is a sum over lanes.
constexpr int64_t kStreamCols = HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_NEON ? 128 : 8;
// Keys whose scores are computed before their values are read, at most; and the bytes of keys (or values) of such a
// tile. Few columns: the rows in use and the rows being fetched, three tiles in all, are to leave room in L1 (measured:
// 8 KiB a tile, 32 rows of 128 bf16, reads 15 % faster than 16 KiB; halving again costs more softmax steps than it
// brings). More columns are bound by arithmetic: the tile lies in L2, and is larger, for each column's sums are loaded
// and stored once a tile.
constexpr int64_t kStreamKeys = 64;
constexpr int64_t kStreamBytes = 8192;
constexpr int64_t kStreamFewCols = 4;
constexpr int64_t kStreamBytesL2 = 160 << 10;
// Bytes of queries that stay in L1 while rows of keys pass.
constexpr int64_t kStreamQueryBytes = 40960;
// Columns that one pass over a row serves: 4 keys x so many sums in registers.
constexpr int kStreamHeads = HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_NEON ? 6 : 2;

// A chunk of a row: 2 * kLanes elements, as two vectors. bf16: the even and the odd elements; f32: the lower and the
// upper half. Queries and sums of values are held in the same order.
constexpr int64_t kChunk = 2 * kLanes;

HWY_INLINE void LoadChunk(const bf16* at, VF& first, VF& second) {
  const VU words = LoadWords(at);
  first = LowBf16(words);
  second = HighBf16(words);
}
HWY_INLINE void LoadChunk(const float* at, VF& first, VF& second) {
  first = hn::LoadU(DF(), at);
  second = hn::LoadU(DF(), at + kLanes);
}
// The last `count` < kChunk elements of a row (an even number of bf16), zeros behind them.
template <typename T>
HWY_INLINE void LoadPartial(const T* at, int64_t count, VF& first, VF& second) {
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX2
  // Masked loads do not touch what they leave out.
  if constexpr (sizeof(T) == 2) {
    const VU words =
        hn::MaskedLoad(hn::FirstN(DU(), static_cast<size_t>(count / 2)), DU(), reinterpret_cast<const uint32_t*>(at));
    first = LowBf16(words);
    second = HighBf16(words);
  } else {
    first = hn::MaskedLoad(hn::FirstN(DF(), static_cast<size_t>(std::min(count, kLanes))), DF(), at);
    second = hn::Zero(DF());
    if (count > kLanes) {
      second = hn::MaskedLoad(hn::FirstN(DF(), static_cast<size_t>(count - kLanes)), DF(), at + kLanes);
    }
  }
#else
  HWY_ALIGN T values[kChunk] = {};
  std::memcpy(values, at, static_cast<size_t>(count) * sizeof(T));
  LoadChunk(values, first, second);
#endif
}

// sums[i] = the sum of the lanes of v_i.
HWY_INLINE void SumLanes4(VF v0, VF v1, VF v2, VF v3, float* sums) {
#if HWY_TARGET == HWY_SCALAR
  sums[0] = hn::GetLane(v0);
  sums[1] = hn::GetLane(v1);
  sums[2] = hn::GetLane(v2);
  sums[3] = hn::GetLane(v3);
#else
  const DF d;
  const hn::RepartitionToWide<DF> dd;
  const VF a = hn::Add(hn::InterleaveLower(d, v0, v1), hn::InterleaveUpper(d, v0, v1));
  const VF b = hn::Add(hn::InterleaveLower(d, v2, v3), hn::InterleaveUpper(d, v2, v3));
  const auto wide_a = hn::BitCast(dd, a);
  const auto wide_b = hn::BitCast(dd, b);
  // Now each block of 4 lanes holds its share of the 4 sums.
  const VF blocks = hn::Add(hn::BitCast(d, hn::InterleaveLower(dd, wide_a, wide_b)),
                            hn::BitCast(d, hn::InterleaveUpper(dd, wide_a, wide_b)));
  const hn::FixedTag<float, 4> d4;
#if HWY_MAX_BYTES == 64
  const hn::Half<DF> d8;
  const auto half = hn::Add(hn::LowerHalf(d8, blocks), hn::UpperHalf(d8, blocks));
  hn::StoreU(hn::Add(hn::LowerHalf(d4, half), hn::UpperHalf(d4, half)), d4, sums);
#elif HWY_MAX_BYTES == 32
  hn::StoreU(hn::Add(hn::LowerHalf(d4, blocks), hn::UpperHalf(d4, blocks)), d4, sums);
#else
  hn::StoreU(blocks, d4, sums);
#endif
#endif
}

HWY_INLINE void PrefetchRow(const void* row, int64_t from, int64_t to, bool near) {
  const char* at = static_cast<const char*>(row);
  if (near) {
    for (int64_t b = from; b < to; b += 64) __builtin_prefetch(at + b, 0, 3);
  } else {
    for (int64_t b = from; b < to; b += 64) __builtin_prefetch(at + b, 0, 2);
  }
}

// The first (0) or second (1) vector of a chunk.
template <int kHalf>
HWY_INLINE VF LoadHalfChunk(const bf16* at) {
  const VU words = LoadWords(at);
  return kHalf == 0 ? LowBf16(words) : HighBf16(words);
}
template <int kHalf>
HWY_INLINE VF LoadHalfChunk(const float* at) {
  return hn::LoadU(DF(), at + kHalf * kLanes);
}

// sums[i][h] += half a chunk of q_h . row_i. The rows' vectors stay in registers, a query's is used as it is loaded.
template <int kHalf, int kHeads, typename T>
HWY_INLINE void DotHalf(const float* HWY_RESTRICT q, int64_t q_stride, const T* const* rows, int64_t at,
                        VF (&sums)[4][kHeads]) {
  const DF d;
  VF values[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) values[i] = LoadHalfChunk<kHalf>(rows[i] + at);
#pragma GCC unroll 8
  for (int h = 0; h < kHeads; ++h) {
    const VF query = hn::Load(d, q + h * q_stride + at + kHalf * kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums[i][h] = hn::MulAdd(values[i], query, sums[i][h]);
  }
}

// scores[h * kStreamKeys + i] = q_h . row_i for four rows and kHeads columns.
template <int kHeads, typename T>
void Dot4(const float* HWY_RESTRICT q, int64_t q_stride, const T* const* rows, int64_t dim,
          float* HWY_RESTRICT scores) {
  const DF d;
  VF sums[4][kHeads];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) sums[i][h] = hn::Zero(d);
  }
  int64_t at = 0;
  for (; at + kChunk <= dim; at += kChunk) {
    DotHalf<0>(q, q_stride, rows, at, sums);
    DotHalf<1>(q, q_stride, rows, at, sums);
  }
  if (at < dim) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      VF first, second;
      LoadPartial(rows[i] + at, dim - at, first, second);
#pragma GCC unroll 8
      for (int h = 0; h < kHeads; ++h) {
        sums[i][h] = hn::MulAdd(first, hn::Load(d, q + h * q_stride + at), sums[i][h]);
        sums[i][h] = hn::MulAdd(second, hn::Load(d, q + h * q_stride + at + kLanes), sums[i][h]);
      }
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < kHeads; ++h) {
    SumLanes4(sums[0][h], sums[1][h], sums[2][h], sums[3][h], scores + h * kStreamKeys);
  }
}

// Bytes [from, to) of some rows, to be fetched while as many others are used.
template <typename T>
struct FetchRows {
  const T* const* rows;
  int64_t from;
  int64_t to;
  bool near;  // into L1
};

// o_h = o_h * alpha_h + sum over keys of p_h[key] * row_key, for kHeads columns and kChunks chunks of the rows from
// `at` on. `partial` > 0: the one chunk has only so many elements. `fetch`: what is to be fetched meanwhile.
template <int kHeads, int kChunks, typename T>
HWY_INLINE void AddRows(const float* HWY_RESTRICT p, const float* alpha, const T* const* rows, int64_t keys, int64_t at,
                        int64_t partial, float* HWY_RESTRICT o, int64_t o_stride, const FetchRows<T>& fetch) {
  const DF d;
  VF sums[kHeads][2 * kChunks];
#pragma GCC unroll 8
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 8
    for (int c = 0; c < 2 * kChunks; ++c) {
      sums[h][c] = hn::Mul(hn::Load(d, o + h * o_stride + at + c * kLanes), hn::Set(d, alpha[h]));
    }
  }
  for (int64_t key = 0; key < keys; ++key) {
    if (fetch.from < fetch.to) PrefetchRow(fetch.rows[key], fetch.from, fetch.to, fetch.near);
    VF values[2 * kChunks];
    if (partial > 0) {
      LoadPartial(rows[key] + at, partial, values[0], values[1]);
    } else {
#pragma GCC unroll 4
      for (int c = 0; c < kChunks; ++c) LoadChunk(rows[key] + at + c * kChunk, values[2 * c], values[2 * c + 1]);
    }
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) {
      const VF weight = hn::Set(d, p[h * kStreamKeys + key]);
#pragma GCC unroll 8
      for (int c = 0; c < 2 * kChunks; ++c) sums[h][c] = hn::MulAdd(weight, values[c], sums[h][c]);
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 8
    for (int c = 0; c < 2 * kChunks; ++c) hn::Store(sums[h][c], d, o + h * o_stride + at + c * kLanes);
  }
}

// Chunks that one pass over the values serves: kHeads * 2 * kWide sums in registers.
template <int kHeads>
constexpr int kWideOf = kHeads <= (kStreamHeads > 2 ? 2 : 1) ? 4 : 2;

// All chunks of the rows for kHeads columns. `fetch`: what is left to be fetched, a line of each row a pass, or all of
// it in the one pass over short rows.
template <int kHeads, typename T>
void AddAllRows(const float* p, const float* alpha, const T* const* rows, int64_t keys, int64_t dim, float* o,
                int64_t o_stride, int64_t lines, FetchRows<T>& fetch) {
  constexpr int kWide = kWideOf<kHeads>;
  const int64_t end = fetch.to;
  int64_t at = 0;
  auto share = [&] {
    fetch.to = std::min(end, fetch.from + lines * 64);
    return fetch;
  };
  for (; at + kWide * kChunk <= dim; at += kWide * kChunk) {
    AddRows<kHeads, kWide>(p, alpha, rows, keys, at, 0, o, o_stride, share());
    fetch.from = fetch.to;
  }
  for (; at < dim; at += kChunk) {
    const int64_t partial = at + kChunk <= dim ? 0 : dim - at;
    AddRows<kHeads, 1>(p, alpha, rows, keys, at, partial, o, o_stride, share());
    fetch.from = fetch.to;
  }
  fetch.to = end;
}

// Calls fn(heads, c) for groups of `heads` <= kStreamHeads columns c, c + 1, ... of [begin, end), as equal as can be;
// `heads` is a compile-time constant.
template <class Fn>
HWY_INLINE void ForColumnGroups(int64_t begin, int64_t end, const Fn& fn) {
  const Strips groups(end - begin, kStreamHeads);
  int64_t c = begin;
  for (int64_t g = 0; g < groups.count; c += groups.HeightOf(g), ++g) {
    switch (groups.HeightOf(g)) {
      case 1:
        fn(std::integral_constant<int, 1>(), c);
        break;
      case 2:
        fn(std::integral_constant<int, 2>(), c);
        break;
      default:
        if constexpr (kStreamHeads >= 6) {
          switch (groups.HeightOf(g)) {
            case 3:
              fn(std::integral_constant<int, 3>(), c);
              break;
            case 4:
              fn(std::integral_constant<int, 4>(), c);
              break;
            case 5:
              fn(std::integral_constant<int, 5>(), c);
              break;
            case 6:
              fn(std::integral_constant<int, 6>(), c);
              break;
          }
        }
    }
  }
}

struct StreamState {
  int64_t k_stride = 0;     // floats of a packed query
  int64_t v_stride = 0;     // floats of a column's sums
  float* q = nullptr;       // [cols, k_stride]
  float* o = nullptr;       // [cols, v_stride]
  float* scores = nullptr;  // [cols, kStreamKeys]
  float* m = nullptr;       // [cols]
  float* l = nullptr;       // [cols]
  float* alpha = nullptr;   // [cols]
};

// Scores -> probabilities of one column, of which `seen` keys are visible; returns alpha.
float SoftmaxColumn(float* HWY_RESTRICT scores, int64_t seen, int64_t keys, float& m, float& l) {
  const DF d;
  const hn::CappedTag<float, 1> d1;
  if (seen <= 0) {
    std::fill(scores, scores + keys, 0.0f);
    return 1.0f;
  }
  // Whole vectors: what lies behind the visible keys (and is inside the array) weighs nothing.
  const int64_t padded = (std::max(keys, seen) + kLanes - 1) / kLanes * kLanes;
  std::fill(scores + seen, scores + padded, -kInfinity);
  VF top = hn::Set(d, m);
  for (int64_t i = 0; i < padded; i += kLanes) top = hn::Max(top, hn::Load(d, scores + i));
  const float largest = hn::GetLane(hn::MaxOfLanes(d, top));
  const float base = largest == -kInfinity ? 0.0f : largest;
  VF sum = hn::Zero(d);
  for (int64_t i = 0; i < padded; i += kLanes) {
    const VF p = Exp2(d, hn::Sub(hn::Load(d, scores + i), hn::Set(d, base)));
    hn::Store(p, d, scores + i);
    sum = hn::Add(sum, p);
  }
  const float alpha = hn::GetLane(Exp2(d1, hn::Set(d1, m - base)));
  l = l * alpha + hn::GetLane(hn::SumOfLanes(d, sum));
  m = largest;
  return alpha;
}

template <typename T>
void RowsOf(const KvPages& kv, const HeadRows& of, int64_t key0, int64_t keys, const T** rows) {
  ForKeys(kv, of, key0, keys,
          [&](int64_t i, int64_t index) HWY_ATTR { rows[i] = static_cast<const T*>(of.data) + index; });
  // Scores are computed four at a time: the last rows of the tile are repeated.
  for (int64_t i = keys; i % 4 != 0; ++i) rows[i] = rows[keys - 1];
}

template <typename T>
void StreamShard(const PieceView& view, const KvPages& kv, int64_t lo, int64_t hi, StreamState& state) {
  const HeadRows k_of = KeyRows(view, kv);
  const HeadRows v_of = ValueRows(view, kv);
  const bool shared = ValuesAreKeys(k_of, v_of);
  const int64_t v_bytes = view.v_dim * static_cast<int64_t>(sizeof(T));
  const int64_t k_bytes = view.k_dim * static_cast<int64_t>(sizeof(T));
  const bool near = view.cols <= kStreamFewCols;
  const int64_t tile_bytes = near ? kStreamBytes : kStreamBytesL2;
  // A multiple of 16: whole vectors of scores.
  const int64_t step = std::clamp<int64_t>(tile_bytes / std::max(k_bytes, v_bytes) / 16 * 16, 16, kStreamKeys);
  // Passes over the values of a tile, and lines of a next row of keys that each is to fetch.
  const int64_t groups = (view.cols + kStreamHeads - 1) / kStreamHeads;
  const int64_t wide = (view.cols <= 2 ? kWideOf<1> : 2) * kChunk;
  const int64_t passes = groups * std::max<int64_t>(1, view.v_dim / wide);
  const int64_t lines = ((k_bytes + 63) / 64 + passes - 1) / passes;
  const int64_t block = std::max<int64_t>(1, kStreamQueryBytes / (kStreamHeads * state.k_stride * 4)) * kStreamHeads;
  const T* k_rows[2][kStreamKeys];
  const T* v_memory[kStreamKeys];
  int now = 0;
  RowsOf<T>(kv, k_of, lo, std::min(step, hi - lo), k_rows[0]);
  for (int64_t key0 = lo; key0 < hi; key0 += step, now ^= 1) {
    const int64_t keys = std::min(step, hi - key0);
    if (!shared) RowsOf<T>(kv, v_of, key0, keys, v_memory);
    const T* const* v_rows = shared ? k_rows[now] : v_memory;
    // The values are fetched while the scores are computed, the next tile's keys while the values are summed.
    const int64_t next_keys = std::min(step, hi - key0 - keys);
    if (next_keys > 0) {
      RowsOf<T>(kv, k_of, key0 + keys, next_keys, k_rows[now ^ 1]);
      for (int64_t i = next_keys; i < keys; ++i) k_rows[now ^ 1][i] = k_rows[now ^ 1][next_keys - 1];
    }
    for (int64_t c0 = 0; c0 < view.cols; c0 += block) {
      const int64_t c1 = std::min(c0 + block, view.cols);
      for (int64_t i = 0; i < keys; i += 4) {
        for (int64_t j = i; j < std::min(i + 4, keys) && !shared && c0 == 0; ++j) {
          PrefetchRow(v_rows[j], 0, v_bytes, near);
        }
        for (int64_t j = i + 4; j < std::min(i + 8, keys) && !near; ++j) PrefetchRow(k_rows[now][j], 0, k_bytes, true);
        ForColumnGroups(c0, c1, [&](auto heads, int64_t c) HWY_ATTR {
          Dot4<heads>(state.q + c * state.k_stride, state.k_stride, k_rows[now] + i, view.k_dim,
                      state.scores + c * kStreamKeys + i);
        });
      }
    }
    for (int64_t c = 0; c < view.cols; ++c) {
      const int64_t seen = std::min<int64_t>(kv.visible[view.Row(c)] - key0, keys);
      state.alpha[c] = SoftmaxColumn(state.scores + c * kStreamKeys, seen, keys, state.m[c], state.l[c]);
    }
    FetchRows<T> fetch = {k_rows[now ^ 1], 0, next_keys > 0 ? k_bytes : 0, near};
    ForColumnGroups(0, view.cols, [&](auto heads, int64_t c) HWY_ATTR {
      AddAllRows<heads>(state.scores + c * kStreamKeys, state.alpha + c, v_rows, keys, view.v_dim,
                        state.o + c * state.v_stride, state.v_stride, lines, fetch);
    });
  }
}

// Where element d of a row lies among the packed ones.
template <typename T>
HWY_INLINE int64_t PackedAt(int64_t d) {
  if constexpr (sizeof(T) == 4) return d;
  return d / kChunk * kChunk + d % 2 * kLanes + d % kChunk / 2;
}

template <typename T>
void StreamPieceOf(const AttentionArgs& args, const PieceView& view) {
  StreamState state;
  state.k_stride = (view.k_dim + kChunk - 1) / kChunk * kChunk;
  state.v_stride = (view.v_dim + kChunk - 1) / kChunk * kChunk;
  state.q =
      cpu::ScratchOf<float>(cpu::ScratchSlot::kWork, view.cols * (state.k_stride + state.v_stride + kStreamKeys + 3));
  state.o = state.q + view.cols * state.k_stride;
  state.scores = state.o + view.cols * state.v_stride;
  state.m = state.scores + view.cols * kStreamKeys;
  state.l = state.m + view.cols;
  state.alpha = state.l + view.cols;
  std::fill(state.q, state.scores, 0.0f);
  for (int64_t c = 0; c < view.cols; ++c) {
    const float* query = view.Query(c);
    float* to = state.q + c * state.k_stride;
    for (int64_t d = 0; d < view.k_dim; ++d) to[PackedAt<T>(d)] = query[d] * (args.scale * kLog2E);
    state.m[c] = -kInfinity;
    state.l[c] = 0;
  }
  view.ForShards([&](const KvPages& kv, int64_t lo, int64_t hi) HWY_ATTR { StreamShard<T>(view, kv, lo, hi, state); });
  for (int64_t c = 0; c < view.cols; ++c) {
    const float* from = state.o + c * state.v_stride;
    const float inverse = state.l[c] > 0 ? 1.0f / state.l[c] : 0.0f;
    float* out = view.Out(c);
    for (int64_t d = 0; d < view.v_dim; ++d) out[d] = from[PackedAt<T>(d)] * inverse;
    view.SetLse(c, state.m[c], state.l[c]);
  }
}

bool StreamsPiece(const AttentionArgs& args, const PieceView& view) {
  if (view.cols > kStreamCols) return false;
  // Chunks of bf16 are words of two; shards of different types have no common order of a row.
  if (args.k_dim % 2 != 0 || args.v_dim % 2 != 0) return false;
  for (const KvPages& kv : view.task.kv) {
    if (kv.dtype != view.task.kv.front().dtype) return false;
  }
  return true;
}

void StreamPiece(const AttentionArgs& args, const PieceView& view) {
  if (view.task.kv.empty() || view.task.kv.front().dtype == DType::kBF16) {
    StreamPieceOf<bf16>(args, view);
  } else {
    StreamPieceOf<float>(args, view);
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace weft
HWY_AFTER_NAMESPACE();

#endif
