// The kernels that touch each element once or a few times: norms, activations, rope, cache writes, merge, sampling.

#include <algorithm>
#include <cmath>
#include <limits>

#include "weft/kernels/cpu/kernels.h"
#include "weft/kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "weft/kernels/cpu/elementwise.cc"
#include "hwy/foreach_target.h"
//
#include "hwy/highway.h"
#include "weft/kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace weft {
namespace HWY_NAMESPACE {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Rows a thread takes at a time: pieces of some 16k elements take a microsecond or more, what waking a thread costs.
int64_t RowGrain(int64_t cols) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(cols, 1)); }

template <class D>
using LanesOf = hn::Vec<D>;

void RmsNorm(const float* x, int64_t x_stride, const float* weight, float eps, float* y, int64_t y_stride, int64_t rows,
             int64_t cols, ThreadPool& pool) {
  pool.ParallelFor(rows, RowGrain(cols), [&](int64_t begin, int64_t end, int) HWY_ATTR {
    const DF d;
    for (int64_t row = begin; row < end; ++row) {
      const float* in = x + row * x_stride;
      float* out = y + row * y_stride;
      VF s0 = hn::Zero(d), s1 = hn::Zero(d), s2 = hn::Zero(d), s3 = hn::Zero(d);
      int64_t i = 0;
      for (; i + 4 * kLanes <= cols; i += 4 * kLanes) {
        const VF a = hn::LoadU(d, in + i), b = hn::LoadU(d, in + i + kLanes);
        const VF e = hn::LoadU(d, in + i + 2 * kLanes), f = hn::LoadU(d, in + i + 3 * kLanes);
        s0 = hn::MulAdd(a, a, s0);
        s1 = hn::MulAdd(b, b, s1);
        s2 = hn::MulAdd(e, e, s2);
        s3 = hn::MulAdd(f, f, s3);
      }
      for (; i + kLanes <= cols; i += kLanes) {
        const VF a = hn::LoadU(d, in + i);
        s0 = hn::MulAdd(a, a, s0);
      }
      double squares = hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(s0, s1), hn::Add(s2, s3))));
      for (; i < cols; ++i) squares += static_cast<double>(in[i]) * in[i];
      const float inverse = static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(cols) + eps));
      ForLanes(cols, [&](auto tag, int64_t c) HWY_ATTR {
        const auto scaled = hn::Mul(hn::LoadU(tag, in + c), hn::Set(tag, inverse));
        hn::StoreU(hn::Mul(scaled, hn::LoadU(tag, weight + c)), tag, out + c);
      });
    }
  });
}

void Add(float* x, int64_t x_stride, const float* delta, int64_t delta_stride, int64_t rows, int64_t cols,
         ThreadPool& pool) {
  pool.ParallelFor(rows, RowGrain(cols), [&](int64_t begin, int64_t end, int) HWY_ATTR {
    for (int64_t row = begin; row < end; ++row) {
      float* to = x + row * x_stride;
      const float* from = delta + row * delta_stride;
      ForLanes(cols, [&](auto tag, int64_t c) HWY_ATTR {
        hn::StoreU(hn::Add(hn::LoadU(tag, to + c), hn::LoadU(tag, from + c)), tag, to + c);
      });
    }
  });
}

void Swiglu(const float* gate, int64_t gate_stride, const float* up, int64_t up_stride, float* out, int64_t out_stride,
            int64_t rows, int64_t cols, ThreadPool& pool) {
  pool.ParallelFor(rows, std::max<int64_t>(1, RowGrain(cols) / 2), [&](int64_t begin, int64_t end, int) HWY_ATTR {
    for (int64_t row = begin; row < end; ++row) {
      const float* g = gate + row * gate_stride;
      const float* u = up + row * up_stride;
      float* to = out + row * out_stride;
      ForLanes(cols, [&](auto tag, int64_t c) HWY_ATTR {
        const auto x = hn::LoadU(tag, g + c);
        const auto one = hn::Set(tag, 1.0f);
        const auto silu = hn::Div(x, hn::Add(one, Exp(tag, hn::Neg(x))));
        hn::StoreU(hn::Mul(silu, hn::LoadU(tag, u + c)), tag, to + c);
      });
    }
  });
}

void RotateHalves(float* x, const float* cosines, const float* sines, int64_t half) {
  ForLanes(half, [&](auto tag, int64_t i) HWY_ATTR {
    const auto a = hn::LoadU(tag, x + i);
    const auto b = hn::LoadU(tag, x + i + half);
    const auto c = hn::LoadU(tag, cosines + i);
    const auto s = hn::LoadU(tag, sines + i);
    hn::StoreU(hn::NegMulAdd(b, s, hn::Mul(a, c)), tag, x + i);
    hn::StoreU(hn::MulAdd(b, c, hn::Mul(a, s)), tag, x + i + half);
  });
}

void RotatePairs(float* x, const float* cosines, const float* sines, int64_t half) {
  ForLanes(half, [&](auto tag, int64_t i) HWY_ATTR {
    auto a = hn::Zero(tag);
    auto b = hn::Zero(tag);
    hn::LoadInterleaved2(tag, x + 2 * i, a, b);
    const auto c = hn::LoadU(tag, cosines + i);
    const auto s = hn::LoadU(tag, sines + i);
    hn::StoreInterleaved2(hn::NegMulAdd(b, s, hn::Mul(a, c)), hn::MulAdd(b, c, hn::Mul(a, s)), tag, x + 2 * i);
  });
}

void Rope(const RopeArgs& args, ThreadPool& pool) {
  const int64_t half = args.rotary_dim / 2;
  pool.ParallelFor(args.rows, RowGrain(args.heads * args.rotary_dim), [&](int64_t begin, int64_t end, int) HWY_ATTR {
    for (int64_t row = begin; row < end; ++row) {
      const float* cosines = args.cos_sin + args.positions[row] * args.rotary_dim;
      for (int64_t head = 0; head < args.heads; ++head) {
        float* x = args.x + row * args.row_stride + head * args.head_stride;
        if (args.interleaved) {
          RotatePairs(x, cosines, cosines + half, half);
        } else {
          RotateHalves(x, cosines, cosines + half, half);
        }
      }
    }
  });
}

void SumParts(std::span<const float* const> parts, int64_t count, float* out, ThreadPool& pool) {
  pool.ParallelFor(count, 16384, [&](int64_t begin, int64_t end, int) HWY_ATTR {
    ForLanes(end - begin, [&](auto tag, int64_t i) HWY_ATTR {
      auto sum = hn::Zero(tag);
      for (const float* part : parts) sum = hn::Add(sum, hn::LoadU(tag, part + begin + i));
      hn::StoreU(sum, tag, out + begin + i);
    });
  });
}

// Rounds to nearest even, as ToBf16 does; a NaN stays a quiet NaN.
HWY_INLINE void ToBf16s(const float* from, int64_t n, bf16* to) {
  const DF d;
  const DU du;
  const hn::Rebind<uint16_t, DF> d16;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const VF x = hn::LoadU(d, from + i);
    const VU bits = hn::BitCast(du, x);
    const VU odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1));
    const VU rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7fff))));
    const VU quiet = hn::Or(hn::ShiftRight<16>(bits), hn::Set(du, 0x40));
    const VU result = hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(x)), quiet, rounded);
    hn::StoreU(hn::TruncateTo(d16, result), d16, reinterpret_cast<uint16_t*>(to) + i);
  }
  for (; i < n; ++i) to[i] = ToBf16(from[i]);
}

void StoreRow(const float* from, int64_t n, void* cache, DType dtype, int64_t index) {
  if (dtype == DType::kBF16) {
    ToBf16s(from, n, static_cast<bf16*>(cache) + index);
  } else {
    std::memcpy(static_cast<float*>(cache) + index, from, static_cast<size_t>(n) * sizeof(float));
  }
}

void KvWrite(const KvWriteArgs& args, ThreadPool& pool) {
  const int64_t cols = int64_t{args.kv_heads} * (args.k_dim + args.v_dim);
  pool.ParallelFor(args.rows, RowGrain(cols), [&](int64_t begin, int64_t end, int) HWY_ATTR {
    for (int64_t row = begin; row < end; ++row) {
      if (args.slots[row] < 0) continue;
      const int64_t block = args.slots[row] / args.block_tokens;
      const int64_t offset = args.slots[row] % args.block_tokens;
      for (int64_t head = 0; head < args.kv_heads; ++head) {
        const int64_t index = (block * args.kv_heads + head) * args.block_tokens + offset;
        StoreRow(args.k + row * args.k_stride + head * args.k_dim, args.k_dim, args.k_cache, args.dtype,
                 index * args.k_dim);
        if (args.v == nullptr) continue;
        StoreRow(args.v + row * args.v_stride + head * args.v_dim, args.v_dim, args.v_cache, args.dtype,
                 index * args.v_dim);
      }
    }
  });
}

void MergeHead(const MergeArgs& args, int64_t row, int64_t head) {
  const int64_t shards = static_cast<int64_t>(args.out.size());
  const int64_t at = row * args.lse_row_stride + head;
  float largest = -kInf;
  for (int64_t s = 0; s < shards; ++s) largest = std::max(largest, args.lse[static_cast<size_t>(s)][at]);
  float* to = args.merged + row * args.merged_row_stride + head * args.dim;
  double total = 0;
  if (largest != -kInf) {
    for (int64_t s = 0; s < shards; ++s) {
      total += std::exp(static_cast<double>(args.lse[static_cast<size_t>(s)][at]) - largest);
    }
  }
  // Shards that saw no key do not count, whatever lies in their O. The first that counts sets, the others add.
  bool first = true;
  for (int64_t s = 0; s < shards; ++s) {
    const float lse = args.lse[static_cast<size_t>(s)][at];
    if (lse == -kInf) continue;
    const float weight = static_cast<float>(std::exp(static_cast<double>(lse) - largest) / total);
    const float* from = args.out[static_cast<size_t>(s)] + row * args.out_row_stride + head * args.dim;
    ForLanes(args.dim, [&](auto tag, int64_t i) HWY_ATTR {
      const auto part = hn::Mul(hn::Set(tag, weight), hn::LoadU(tag, from + i));
      hn::StoreU(first ? part : hn::Add(part, hn::LoadU(tag, to + i)), tag, to + i);
    });
    first = false;
  }
  if (first) std::fill(to, to + args.dim, 0.0f);
  if (args.merged_lse != nullptr) {
    args.merged_lse[row * args.heads + head] = first ? -kInf : static_cast<float>(largest + std::log(total));
  }
}

void Merge(const MergeArgs& args, ThreadPool& pool) {
  const int64_t cost = args.dim * static_cast<int64_t>(args.out.size());
  pool.ParallelFor(args.rows * args.heads, RowGrain(cost), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) MergeHead(args, i / args.heads, i % args.heads);
  });
}

float Largest(const float* x, int64_t n) {
  const DF d;
  VF m0 = hn::Set(d, -kInf), m1 = m0, m2 = m0, m3 = m0;
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    m0 = hn::Max(m0, hn::LoadU(d, x + i));
    m1 = hn::Max(m1, hn::LoadU(d, x + i + kLanes));
    m2 = hn::Max(m2, hn::LoadU(d, x + i + 2 * kLanes));
    m3 = hn::Max(m3, hn::LoadU(d, x + i + 3 * kLanes));
  }
  for (; i + kLanes <= n; i += kLanes) m0 = hn::Max(m0, hn::LoadU(d, x + i));
  float largest = hn::GetLane(hn::MaxOfLanes(d, hn::Max(hn::Max(m0, m1), hn::Max(m2, m3))));
  for (; i < n; ++i) largest = std::max(largest, x[i]);
  return largest;
}

int64_t Argmax(const float* x, int64_t n) {
  const float largest = Largest(x, n);
  return std::find(x, x + n, largest) - x;
}

// Sums of 64 vectors in float, the sum of those in double: the vocabulary has 150k entries.
constexpr int64_t kSumBlock = 64 * kLanes;

// Exp clamps its argument, which would turn a NaN into a number: logits that are not numbers must stay seen.
template <class D>
hn::Vec<D> ExpOrNaN(D d, hn::Vec<D> x) {
  return hn::IfThenElse(hn::IsNaN(x), x, Exp(d, x));
}

// sum(exp(x - largest)), NaN if any x is; where `out` is given it receives the terms.
double SumExp(const float* x, int64_t n, float largest, float* out) {
  const DF d;
  const hn::CappedTag<float, 1> d1;
  double total = 0;
  for (int64_t block = 0; block < n; block += kSumBlock) {
    const int64_t end = std::min(block + kSumBlock, n);
    VF sum = hn::Zero(d);
    int64_t i = block;
    for (; i + kLanes <= end; i += kLanes) {
      const VF e = ExpOrNaN(d, hn::Sub(hn::LoadU(d, x + i), hn::Set(d, largest)));
      if (out != nullptr) hn::StoreU(e, d, out + i);
      sum = hn::Add(sum, e);
    }
    total += hn::GetLane(hn::SumOfLanes(d, sum));
    for (; i < end; ++i) {
      const float e = hn::GetLane(ExpOrNaN(d1, hn::Set(d1, x[i] - largest)));
      if (out != nullptr) out[i] = e;
      total += e;
    }
  }
  return total;
}

float LogSumExp(const float* x, int64_t n) {
  const float largest = Largest(x, n);
  if (std::isinf(largest)) return largest;
  return static_cast<float>(largest + std::log(SumExp(x, n, largest, nullptr)));
}

void Softmax(float* x, int64_t n) {
  const float largest = Largest(x, n);
  if (largest == -kInf) {
    std::fill(x, x + n, 0.0f);
    return;
  }
  const float scale = static_cast<float>(1.0 / SumExp(x, n, largest, x));
  ForLanes(n, [&](auto tag, int64_t i)
                  HWY_ATTR { hn::StoreU(hn::Mul(hn::LoadU(tag, x + i), hn::Set(tag, scale)), tag, x + i); });
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace weft
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace weft {
namespace {
HWY_EXPORT(RmsNorm);
HWY_EXPORT(Add);
HWY_EXPORT(Swiglu);
HWY_EXPORT(Rope);
HWY_EXPORT(SumParts);
HWY_EXPORT(KvWrite);
HWY_EXPORT(Merge);
HWY_EXPORT(Argmax);
HWY_EXPORT(LogSumExp);
HWY_EXPORT(Softmax);
}  // namespace

namespace cpu {

void RmsNorm(const float* x, int64_t x_stride, const float* weight, float eps, float* y, int64_t y_stride, int64_t rows,
             int64_t cols, ThreadPool& pool) {
  HWY_DYNAMIC_DISPATCH(RmsNorm)(x, x_stride, weight, eps, y, y_stride, rows, cols, pool);
}
void Add(float* x, int64_t x_stride, const float* delta, int64_t delta_stride, int64_t rows, int64_t cols,
         ThreadPool& pool) {
  HWY_DYNAMIC_DISPATCH(Add)(x, x_stride, delta, delta_stride, rows, cols, pool);
}
void Swiglu(const float* gate, int64_t gate_stride, const float* up, int64_t up_stride, float* out, int64_t out_stride,
            int64_t rows, int64_t cols, ThreadPool& pool) {
  HWY_DYNAMIC_DISPATCH(Swiglu)(gate, gate_stride, up, up_stride, out, out_stride, rows, cols, pool);
}
void Rope(const RopeArgs& args, ThreadPool& pool) { HWY_DYNAMIC_DISPATCH(Rope)(args, pool); }
void SumParts(std::span<const float* const> parts, int64_t count, float* out, ThreadPool& pool) {
  HWY_DYNAMIC_DISPATCH(SumParts)(parts, count, out, pool);
}
void KvWrite(const KvWriteArgs& args, ThreadPool& pool) { HWY_DYNAMIC_DISPATCH(KvWrite)(args, pool); }
void Merge(const MergeArgs& args, ThreadPool& pool) { HWY_DYNAMIC_DISPATCH(Merge)(args, pool); }
int64_t Argmax(const float* x, int64_t n) { return HWY_DYNAMIC_DISPATCH(Argmax)(x, n); }
float LogSumExp(const float* x, int64_t n) { return HWY_DYNAMIC_DISPATCH(LogSumExp)(x, n); }
void Softmax(float* x, int64_t n) { HWY_DYNAMIC_DISPATCH(Softmax)(x, n); }

}  // namespace cpu
}  // namespace weft
#endif  // HWY_ONCE
