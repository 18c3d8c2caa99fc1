#include "weft/model/mla.h"

#include <cstring>

namespace weft {
namespace {

void ReserveFloats(Buffer& buffer, int64_t n) { buffer.Reserve(static_cast<size_t>(n) * sizeof(float)); }

}  // namespace

MlaAttention::MlaAttention(const ModelConfig& config, const ModelWeights& weights, const KernelTable& kernels,
                           const float* rope)
    : c_(config),
      mla_(*config.mla),
      w_(weights),
      k_(kernels),
      rope_(rope),
      heads_(weights.heads),
      qk_dim_(mla_.qk_nope_head_dim + mla_.qk_rope_head_dim),
      latent_column_(mla_.q_lora_rank > 0 ? mla_.q_lora_rank : heads_ * qk_dim_),
      latent_dim_(mla_.kv_lora_rank + mla_.qk_rope_head_dim) {}

void MlaAttention::Run(const ForwardBatch& batch, int64_t layer, float* qkv, float* out, ContextAttention& attention,
                       ThreadPool& pool) {
  const LayerWeights& w = w_.layers[static_cast<size_t>(layer)];
  const int64_t rows = batch.rows;
  const int64_t stride = qkv_dim();
  const int64_t nope = mla_.qk_nope_head_dim;
  float* latents = qkv + latent_column_;

  float* q = qkv;
  int64_t q_stride = stride;
  if (mla_.q_lora_rank > 0) {
    k_.rms_norm(qkv, stride, w.q_a_norm.data(), MlaConfig::kNormEps, qkv, stride, rows, mla_.q_lora_rank, pool);
    q_stride = heads_ * qk_dim_;
    ReserveFloats(q_, rows * q_stride);
    q = q_.as<float>();
    k_.linear({.x = qkv, .x_stride = stride, .m = rows, .w = &w.q_b, .y = q, .y_stride = q_stride}, pool);
  }
  k_.rms_norm(latents, stride, w.kv_a_norm.data(), MlaConfig::kNormEps, latents, stride, rows, mla_.kv_lora_rank, pool);
  RopeArgs rope{.x = q + nope,
                .row_stride = q_stride,
                .head_stride = qk_dim_,
                .rows = rows,
                .heads = heads_,
                .rotary_dim = mla_.qk_rope_head_dim,
                .positions = batch.positions.data(),
                .cos_sin = rope_,
                .interleaved = c_.rope_interleaved};
  k_.rope(rope, pool);
  rope.x = latents + mla_.kv_lora_rank;
  rope.row_stride = stride;
  rope.heads = 1;
  k_.rope(rope, pool);

  const int64_t out_dim = heads_ * mla_.v_head_dim;
  const int64_t first = batch.gather_kv_rows;  // of the gather-Q rows
  const int64_t absorbed = rows - first;
  const int64_t absorbed_dim = heads_ * latent_dim_;
  ReserveFloats(absorbed_q_, absorbed * absorbed_dim);
  ReserveFloats(latent_out_, absorbed * heads_ * mla_.kv_lora_rank);
  if (absorbed > 0) {
    // (W_UK^T q_nope) . c = q_nope . (W_UK c)
    const float* from = q + first * q_stride;
    float* to = absorbed_q_.as<float>();
    products_.clear();
    for (int64_t head = 0; head < heads_; ++head) {
      products_.push_back({.x = from + head * qk_dim_,
                           .x_stride = q_stride,
                           .m = absorbed,
                           .w = &w.k_absorb[static_cast<size_t>(head)],
                           .y = to + head * latent_dim_,
                           .y_stride = absorbed_dim});
    }
    k_.linear_many(products_, pool);
    for (int64_t row = 0; row < absorbed; ++row) {
      for (int64_t head = 0; head < heads_; ++head) {
        std::memcpy(to + row * absorbed_dim + head * latent_dim_ + mla_.kv_lora_rank,
                    from + row * q_stride + head * qk_dim_ + nope,
                    static_cast<size_t>(mla_.qk_rope_head_dim) * sizeof(float));
      }
    }
  }
  attention.Run(layer, {.k = latents,
                        .kv_stride = stride,
                        .gather_kv_q = q,
                        .gather_kv_q_stride = q_stride,
                        .gather_kv_out = out,
                        .gather_q_q = absorbed_q_.as<float>(),
                        .gather_q_q_stride = absorbed_dim,
                        .gather_q_out = latent_out_.as<float>()});
  if (absorbed == 0) return;
  products_.clear();
  for (int64_t head = 0; head < heads_; ++head) {
    products_.push_back({.x = latent_out_.as<float>() + head * mla_.kv_lora_rank,
                         .x_stride = heads_ * mla_.kv_lora_rank,
                         .m = absorbed,
                         .w = &w.v_up[static_cast<size_t>(head)],
                         .y = out + first * out_dim + head * mla_.v_head_dim,
                         .y_stride = out_dim});
  }
  k_.linear_many(products_, pool);
}

void MlaAttention::Expand(int64_t layer, const float* latents, int64_t n, float* expanded, ThreadPool& pool) {
  const LayerWeights& w = w_.layers[static_cast<size_t>(layer)];
  const int64_t stride = heads_ * (qk_dim_ + mla_.v_head_dim);
  products_.clear();
  for (int64_t head = 0; head < heads_; ++head) {
    const auto h = static_cast<size_t>(head);
    LinearArgs args{.x = latents, .x_stride = latent_dim_, .m = n, .y_stride = stride};
    args.w = &w.k_up[h];
    args.y = expanded + head * qk_dim_;
    products_.push_back(args);
    args.w = &w.v_up[h];
    args.y = expanded + heads_ * qk_dim_ + head * mla_.v_head_dim;
    products_.push_back(args);
  }
  k_.linear_many(products_, pool);
  // The one rotated key, for every head.
  const int64_t nope = mla_.qk_nope_head_dim;
  const int64_t rope = mla_.qk_rope_head_dim;
  pool.ParallelFor(n, 64, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      const float* from = latents + row * latent_dim_ + mla_.kv_lora_rank;
      for (int64_t head = 0; head < heads_; ++head) {
        std::memcpy(expanded + row * stride + head * qk_dim_ + nope, from, static_cast<size_t>(rope) * sizeof(float));
      }
    }
  });
}

}  // namespace weft
