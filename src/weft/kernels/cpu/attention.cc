// Blocked attention over pages of keys and values, with an online softmax (Milakov & Gimelshein 2018; Rabe & Staats
// 2021; the blocking is that of FlashAttention, Dao et al. 2022, turned for a CPU's caches). Scores are kept in units
// of log2: the queries are scaled by scale * log2(e) once, and every exp is an exp2.
//
// Two ways, by the number of columns (query rows x query heads of a KV head) of a piece:
//
// Tiled, many columns. Everything lies transposed: S^T = K Q^T, softmax down the columns, O^T += V^T P^T. So a vector
// always holds neighbouring columns, no sum or maximum runs across lanes, and S^T as it leaves the first product is the
// second operand of the second product as it stands: nothing is re-packed. A tile of keys and values is unpacked to f32
// once and used by every panel of columns of the piece; its elements are the broadcast operand of the register tile.
//
// Streamed, few columns (decode). Each row of K and V is read once, straight from the cache, for all columns of its
// head: dot products with K along the row, then the sum of the rows of V weighted by P.

#include <algorithm>
#include <cmath>
#include <limits>

#include "weft/kernels/cpu/attention_plan.h"
#include "weft/kernels/cpu/kernels.h"
#include "weft/kernels/cpu/scratch.h"
#include "weft/kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "weft/kernels/cpu/attention.cc"
#include "hwy/foreach_target.h"
//
#include "hwy/highway.h"
#include "weft/kernels/cpu/attention_stream-inl.h"
#include "weft/kernels/cpu/attention_tiled-inl.h"
#include "weft/kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace weft {
namespace HWY_NAMESPACE {
namespace {

void JoinParts(const AttentionArgs& args, const cpu::AttentionJoin& join, const float* outs, const float* lses) {
  const AttentionTask& task = args.tasks[static_cast<size_t>(join.task)];
  const int64_t group = args.q_heads / args.kv_heads;
  const int64_t cols = join.col1 - join.col0;
  for (int64_t c = 0; c < cols; ++c) {
    const int64_t row = (join.col0 + c) / group;
    const int64_t head = join.kv_head * group + (join.col0 + c) % group;
    float* out = task.out + row * task.out_stride + head * args.v_dim;
    float largest = -kInfinity;
    for (int64_t i = 0; i < join.parts; ++i) largest = std::max(largest, lses[join.first + i * cols + c]);
    std::fill(out, out + args.v_dim, 0.0f);
    double total = 0;
    if (largest != -kInfinity) {
      for (int64_t i = 0; i < join.parts; ++i) {
        total += std::exp(static_cast<double>(lses[join.first + i * cols + c]) - largest);
      }
      for (int64_t i = 0; i < join.parts; ++i) {
        const int64_t index = join.first + i * cols + c;
        const float weight = static_cast<float>(std::exp(static_cast<double>(lses[index]) - largest) / total);
        const float* from = outs + index * args.v_dim;
        ForLanes(args.v_dim, [&](auto tag, int64_t d) HWY_ATTR {
          hn::StoreU(hn::MulAdd(hn::Set(tag, weight), hn::LoadU(tag, from + d), hn::LoadU(tag, out + d)), tag, out + d);
        });
      }
    }
    if (task.lse != nullptr) {
      task.lse[row * task.lse_stride + head] = total > 0 ? static_cast<float>(largest + std::log(total)) : -kInfinity;
    }
  }
}

void Attention(const AttentionArgs& args, ThreadPool& pool) {
  thread_local cpu::AttentionPlan plan_memory;
  cpu::AttentionPlan& plan = plan_memory;
  cpu::PlanAttention(args, pool.size(), MaxColumns(args), kKeyTile, plan);
  float* outs = cpu::ScratchOf<float>(cpu::ScratchSlot::kShared, plan.partials * (args.v_dim + 1));
  float* lses = outs + plan.partials * args.v_dim;
  const int64_t pieces = static_cast<int64_t>(plan.pieces.size());
  pool.ParallelFor(pieces, 1, [&](int64_t begin, int64_t end, int) HWY_ATTR {
    for (int64_t i = begin; i < end; ++i) {
      const cpu::AttentionPiece& piece = plan.pieces[static_cast<size_t>(i)];
      const PieceView view(args, piece, outs, lses);
      if (StreamsPiece(args, view)) {
        StreamPiece(args, view);
      } else {
        TilePiece(args, view);
      }
    }
  });
  const int64_t joins = static_cast<int64_t>(plan.joins.size());
  pool.ParallelFor(joins, std::max<int64_t>(1, joins / pool.size()), [&](int64_t begin, int64_t end, int) HWY_ATTR {
    for (int64_t i = begin; i < end; ++i) JoinParts(args, plan.joins[static_cast<size_t>(i)], outs, lses);
  });
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace weft
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace weft {
namespace {
HWY_EXPORT(Attention);
}

void cpu::Attention(const AttentionArgs& args, ThreadPool& pool) { HWY_DYNAMIC_DISPATCH(weft::Attention)(args, pool); }

}  // namespace weft
#endif  // HWY_ONCE
