// What the SIMD kernels share: the register tile of every matrix product, loads of two bf16 halves, exp2, transposes.
// Included once per Highway target (hence the toggled guard).
#if defined(WEFT_KERNELS_CPU_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WEFT_KERNELS_CPU_SIMD_INL_H_
#undef WEFT_KERNELS_CPU_SIMD_INL_H_
#else
#define WEFT_KERNELS_CPU_SIMD_INL_H_
#endif

#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

#include "hwy/highway.h"
#include "weft/core/dtype.h"

HWY_BEFORE_NAMESPACE();
namespace weft {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using VF = hn::Vec<DF>;
using DU = hn::RebindToUnsigned<DF>;
using VU = hn::Vec<DU>;
using DI = hn::RebindToSigned<DF>;

// Lanes of a vector of floats, known at compile time on every target that targets.h leaves enabled.
constexpr int64_t kLanes = HWY_TARGET == HWY_SCALAR ? 1 : HWY_MAX_BYTES / 4;

// The register tile: kTileRows rows (broadcast) x 2 vectors of columns. An FMA has a latency of 4 and two of them start
// in a cycle, so a tile needs at least 8 accumulators; beyond that every further row makes the two column loads
// cheaper: per step of k, 2 + rows loads feed 2 * rows FMAs, and the load ports (2 a cycle, 3 on some) must not be the
// limit. Registers: 2 * rows accumulators + 2 columns + 1 broadcast <= 32 (AVX-512, NEON) or 16 (AVX2; the broadcast
// there is one of the 16, so 6 rows).
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_NEON
constexpr int kTileRows = 12;
#elif HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_SSE4
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif
constexpr int64_t kTileCols = 2 * kLanes;

// The longest dot product that a tile runs over at once, and the stride of its row-major operand: the columns' panel of
// kDepth x kTileCols floats (32 KiB on AVX-512, 16 KiB on AVX2) lies in L1. The stride is a constant so that the rows
// of a tile are one pointer and immediate offsets, and an odd number of cache lines so that they fall into different
// sets.
constexpr int64_t kDepth = 256;
constexpr int64_t kRowStride = kDepth + 16;

enum class TileStore {
  kSet,       // c = ab
  kAdd,       // c += ab
  kSetAux,    // c = ab + aux        (aux: one value per column)
  kAddAux,    // c += ab + aux
  kScaleAdd,  // c = c * aux + ab
};

// c[i][j] (op)= sum over p < k of a[i * kAI + p * kAP] * b[p * cols + j], for kRows x (kVectors * kLanes) results.
// `b` is a dense panel, 64-byte aligned.
template <int kRows, int kVectors, int64_t kAI, int64_t kAP>
void Tile(const float* HWY_RESTRICT a, const float* HWY_RESTRICT b, int64_t k, float* HWY_RESTRICT c, int64_t c_stride,
          TileStore store, const float* HWY_RESTRICT aux) {
  const DF d;
  VF acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) acc[i][v] = hn::Zero(d);
  }
  for (int64_t p = 0; p < k; ++p) {
    VF bv[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) bv[v] = hn::Load(d, b + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const VF av = hn::Set(d, a[i * kAI]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[i][v] = hn::MulAdd(av, bv[v], acc[i][v]);
    }
    a += kAP;
    b += kVectors * kLanes;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* to = c + i * c_stride + v * kLanes;
      VF r = acc[i][v];
      switch (store) {
        case TileStore::kSet:
          break;
        case TileStore::kAdd:
          r = hn::Add(r, hn::LoadU(d, to));
          break;
        case TileStore::kSetAux:
          r = hn::Add(r, hn::LoadU(d, aux + v * kLanes));
          break;
        case TileStore::kAddAux:
          r = hn::Add(hn::Add(r, hn::LoadU(d, aux + v * kLanes)), hn::LoadU(d, to));
          break;
        case TileStore::kScaleAdd:
          r = hn::MulAdd(hn::LoadU(d, to), hn::LoadU(d, aux + v * kLanes), r);
          break;
      }
      hn::StoreU(r, d, to);
    }
  }
}

using TileFn = void (*)(const float*, const float*, int64_t, float*, int64_t, TileStore, const float*);

template <int kVectors, int64_t kAI, int64_t kAP, int... kRowsMinus1>
constexpr std::array<TileFn, sizeof...(kRowsMinus1) + 1> MakeTiles(std::integer_sequence<int, kRowsMinus1...>) {
  return {nullptr, &Tile<kRowsMinus1 + 1, kVectors, kAI, kAP>...};
}

// The tile of `rows` (1 .. kTileRows) rows.
template <int kVectors, int64_t kAI, int64_t kAP>
TileFn TileOf(int64_t rows) {
  static constexpr auto kTiles = MakeTiles<kVectors, kAI, kAP>(std::make_integer_sequence<int, kTileRows>());
  return kTiles[static_cast<size_t>(rows)];
}

// Cuts `total` rows into strips of nearly equal height, at most `most` each: 16 rows are 8 + 8 rather than 12 + 4.
struct Strips {
  explicit Strips(int64_t total, int64_t most = kTileRows)
      : count((total + most - 1) / most),
        height(count > 0 ? total / count : 0),
        taller(count > 0 ? total % count : 0) {}
  int64_t HeightOf(int64_t strip) const { return height + (strip < taller ? 1 : 0); }
  int64_t count;
  int64_t height;
  int64_t taller;  // the first so many strips have one row more
};

// bf16 values 2i (the low halves of 32-bit words) and 2i + 1 (the high halves) as floats: one shift, one and.
HWY_INLINE VF LowBf16(VU words) { return hn::BitCast(DF(), hn::ShiftLeft<16>(words)); }
HWY_INLINE VF HighBf16(VU words) { return hn::BitCast(DF(), hn::And(words, hn::Set(DU(), 0xffff0000u))); }

HWY_INLINE VU LoadWords(const void* words) { return hn::LoadU(DU(), static_cast<const uint32_t*>(words)); }

// n consecutive values as floats, in their order.
HWY_INLINE void ToFloats(const bf16* from, int64_t n, float* to) {
  const hn::Rebind<uint16_t, DF> d16;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const VU wide = hn::PromoteTo(DU(), hn::LoadU(d16, reinterpret_cast<const uint16_t*>(from) + i));
    hn::StoreU(hn::BitCast(DF(), hn::ShiftLeft<16>(wide)), DF(), to + i);
  }
  for (; i < n; ++i) to[i] = ToFloat(from[i]);
}
HWY_INLINE void ToFloats(const float* from, int64_t n, float* to) {
  std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
}

// 2^x for x <= 127; 0 below -126, so also for -inf. Relative error below 1.5e-7: n = round(x) becomes the exponent, and
// 2^f, |f| <= 1/2, is the polynomial that interpolates it at the Chebyshev nodes (2.5e-9).
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Exp2(D d, V x) {
  const hn::RebindToUnsigned<D> du;
  const V magic = hn::Set(d, 12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  const V clamped = hn::Max(x, hn::Set(d, -126.0f));
  const V shifted = hn::Add(clamped, magic);
  const V f = hn::Sub(clamped, hn::Sub(shifted, magic));
  V p = hn::Set(d, 0.0001546144469646172f);
  p = hn::MulAdd(p, f, hn::Set(d, 0.0013400428177419153f));
  p = hn::MulAdd(p, f, hn::Set(d, 0.00961805667852609f));
  p = hn::MulAdd(p, f, hn::Set(d, 0.05550327226670944f));
  p = hn::MulAdd(p, f, hn::Set(d, 0.24022650922288827f));
  p = hn::MulAdd(p, f, hn::Set(d, 0.6931472067028321f));
  p = hn::MulAdd(p, f, hn::Set(d, 1.0f));
  const auto exponent = hn::ShiftLeft<23>(hn::BitCast(du, shifted));
  const V result = hn::BitCast(d, hn::Add(hn::BitCast(du, p), exponent));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -126.0f)), result);
}

constexpr float kLog2E = 1.44269504088896341f;
constexpr double kLn2 = 0.693147180559945309417;

// e^x for any x up to 88; the product x * log2(e) is kept in two floats, for its rounding error would be multiplied by
// x.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Exp(D d, V x) {
  const hn::RebindToUnsigned<D> du;
  const V magic = hn::Set(d, 12582912.0f);
  const V clamped = hn::Min(hn::Max(x, hn::Set(d, -87.0f)), hn::Set(d, 88.0f));
  const V shifted = hn::MulAdd(clamped, hn::Set(d, kLog2E), magic);
  const V n = hn::Sub(shifted, magic);
  // f = x - n ln 2, ln 2 in two parts of which the first has few bits, so that n * it is exact.
  V f = hn::NegMulAdd(n, hn::Set(d, 0.693359375f), clamped);
  f = hn::MulAdd(n, hn::Set(d, 2.12194440e-4f), f);
  f = hn::Mul(f, hn::Set(d, kLog2E));
  V p = hn::Set(d, 0.0001546144469646172f);
  p = hn::MulAdd(p, f, hn::Set(d, 0.0013400428177419153f));
  p = hn::MulAdd(p, f, hn::Set(d, 0.00961805667852609f));
  p = hn::MulAdd(p, f, hn::Set(d, 0.05550327226670944f));
  p = hn::MulAdd(p, f, hn::Set(d, 0.24022650922288827f));
  p = hn::MulAdd(p, f, hn::Set(d, 0.6931472067028321f));
  p = hn::MulAdd(p, f, hn::Set(d, 1.0f));
  const V result = hn::BitCast(d, hn::Add(hn::BitCast(du, p), hn::ShiftLeft<23>(hn::BitCast(du, shifted))));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -87.0f)), result);
}

// Calls op(tag, i) for whole vectors of [0, n), then op(one-lane tag, i) for what is left.
template <class Op>
HWY_INLINE void ForLanes(int64_t n, const Op& op) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) op(DF(), i);
  for (; i < n; ++i) op(hn::CappedTag<float, 1>(), i);
}

// 4 x 4 transpose: to[j * to_stride + i] = from[i][j] * scale.
HWY_INLINE void Transpose4x4(const float* const from[4], float* to, int64_t to_stride, float scale) {
#if HWY_TARGET == HWY_SCALAR
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) to[j * to_stride + i] = from[i][j] * scale;
  }
#else
  const hn::FixedTag<float, 4> d;
  const hn::FixedTag<double, 2> dd;
  const auto r0 = hn::LoadU(d, from[0]);
  const auto r1 = hn::LoadU(d, from[1]);
  const auto r2 = hn::LoadU(d, from[2]);
  const auto r3 = hn::LoadU(d, from[3]);
  const auto a = hn::BitCast(dd, hn::InterleaveLower(d, r0, r1));  // 00 10 01 11
  const auto b = hn::BitCast(dd, hn::InterleaveLower(d, r2, r3));
  const auto e = hn::BitCast(dd, hn::InterleaveUpper(d, r0, r1));
  const auto f = hn::BitCast(dd, hn::InterleaveUpper(d, r2, r3));
  const auto s = hn::Set(d, scale);
  hn::StoreU(hn::Mul(s, hn::BitCast(d, hn::InterleaveLower(dd, a, b))), d, to);
  hn::StoreU(hn::Mul(s, hn::BitCast(d, hn::InterleaveUpper(dd, a, b))), d, to + to_stride);
  hn::StoreU(hn::Mul(s, hn::BitCast(d, hn::InterleaveLower(dd, e, f))), d, to + 2 * to_stride);
  hn::StoreU(hn::Mul(s, hn::BitCast(d, hn::InterleaveUpper(dd, e, f))), d, to + 3 * to_stride);
#endif
}

}  // namespace HWY_NAMESPACE
}  // namespace weft
HWY_AFTER_NAMESPACE();

#endif
