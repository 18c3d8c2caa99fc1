#pragma once
// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) of one rank: from the hidden state to the rows that
// o_proj takes. The cache holds one row [latent, k_rope] a token. Gather-KV rows attend to keys and values expanded
// from the latents; gather-Q rows to the latents themselves, with the expansion absorbed into the query and the output.

#include <cstdint>
#include <vector>

#include "weft/core/buffer.h"
#include "weft/model/config.h"
#include "weft/model/context_attention.h"
#include "weft/model/weights.h"

namespace weft {

class MlaAttention : public KvExpansion {
 public:
  // `rope`: RopeCache's data.
  MlaAttention(const ModelConfig& config, const ModelWeights& weights, const KernelTable& kernels, const float* rope);

  // Columns of LayerWeights::qkv.
  int64_t qkv_dim() const { return latent_column_ + latent_dim_; }

  // `qkv` [rows, qkv_dim()] is the product with LayerWeights::qkv, and is changed. `out` becomes
  // [rows, heads * v_head_dim]. Collective like ContextAttention::Run; attention.Begin(batch) has been called.
  void Run(const ForwardBatch& batch, int64_t layer, float* qkv, float* out, ContextAttention& attention,
           ThreadPool& pool);

  int64_t k_dim() const override { return qk_dim_; }
  int64_t v_dim() const override { return mla_.v_head_dim; }
  void Expand(int64_t layer, const float* latents, int64_t n, float* expanded, ThreadPool& pool) override;

 private:
  const ModelConfig& c_;
  const MlaConfig& mla_;
  const ModelWeights& w_;
  const KernelTable& k_;
  const float* rope_;
  int64_t heads_;
  int64_t qk_dim_;         // nope + rope
  int64_t latent_column_;  // of a row of qkv: where the latent begins
  int64_t latent_dim_;     // kv_lora + rope
  Buffer q_, absorbed_q_, latent_out_;
  std::vector<LinearArgs> products_;
};

}  // namespace weft
