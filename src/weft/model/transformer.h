#pragma once
// The model graph of one rank, driven by ModelConfig: Llama, Qwen2, Qwen3, DeepSeek-V2 and V3, dense or mixtures of
// experts.

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "weft/core/buffer.h"
#include "weft/core/thread_pool.h"
#include "weft/cp/grid.h"
#include "weft/kernels/table.h"
#include "weft/model/config.h"
#include "weft/model/context_attention.h"
#include "weft/model/forward_batch.h"
#include "weft/model/kv_cache.h"
#include "weft/model/mla.h"
#include "weft/model/moe.h"
#include "weft/model/tensor_parallel.h"
#include "weft/model/weights.h"

namespace weft {

// cos and sin of every position up to max_position, shared by all ranks: [positions, rotary_dim], cosines then sines.
class RopeCache {
 public:
  RopeCache(const RopeConfig& rope, int64_t rotary_dim, int64_t max_position);
  const float* data() const { return values_.as<float>(); }

 private:
  Buffer values_;
};

class Transformer {
 public:
  struct Options {
    const ModelConfig* config = nullptr;
    std::shared_ptr<const ModelWeights> weights;
    std::shared_ptr<const ExpertWeights> experts;  // this rank's, of a model that has some
    std::shared_ptr<const RopeCache> rope;
    KvCache* cache = nullptr;
    cp::ParallelConfig parallel;
    cp::RankCoord coord;
    ForwardGroups groups;
    bool expert_parallel = false;  // the experts are shared out over groups.world; else cut over groups.tp
    const KernelTable* kernels = nullptr;
    ThreadPool* pool = nullptr;
    ThreadPool* joint_pool = nullptr;       // on PCP rank 0: as many threads as its PCP group has
    int64_t context_segment_tokens = 8192;  // ContextAttention's segment_tokens
    bool stream = false;                    // ContextAttention's and MoeExperts' `stream`
  };
  // Collective: every rank of the groups constructs its own at the same time.
  explicit Transformer(Options options);

  // Runs all layers; the residual stream of every row stays until the next call. Collective over all ranks, or, where
  // batch.solo is set, over those of PCP rank 0, with all threads of their PCP group.
  void Forward(const ForwardBatch& batch);

  // ContextAttention::exchanged_bytes.
  int64_t exchanged_bytes() const { return attention_.exchanged_bytes(); }

  // Logits [rows.size(), vocab_size] of some rows of the last Forward. Collective over the TP group, with the same rows
  // on all of it; complete on TP rank 0, whose `logits` alone is written (others may pass null).
  void Logits(std::span<const int64_t> rows, float* logits);

  // [rows] of the last Forward, where its batch asked for it and there are experts, else empty: the least ChoiceMargin
  // over the layers. With expert parallelism infinity for rows that another TP rank has routed.
  std::span<const float> router_margins() const { return router_margins_; }

  // MoeExperts::load; empty without experts.
  std::span<const int64_t> expert_load() const { return moe_ ? moe_->load() : std::span<const int64_t>{}; }

 private:
  void Embed(const ForwardBatch& batch);
  // attn_ = the attention's output for the rows of normed_.
  void Attention(const ForwardBatch& batch, int64_t layer);
  // x += what the layer's MLP or experts make of the rows of normed_. `most_rows`: of any rank that shares the experts.
  void DenseMlp(int64_t layer);
  void MoeMlp(int64_t layer, int64_t most_rows);
  // y = W_down (silu(gate) * up) of rows [row0, row0 + rows) of normed_, of a gate_up and down pair.
  void Mlp(const LayerWeights& w, int64_t ffn, int64_t row0, int64_t rows, float* y, bool accumulate);
  // x[row0 ...] += the sum over the TP group of W y (+ bias); `w` is this rank's slice of the input features.
  void RowParallel(const float* y, int64_t y_stride, const PackedWeights& w, const std::vector<float>& bias,
                   int64_t row0, int64_t rows);

  // The threads of the current step.
  ThreadPool& pool() const { return solo_ ? *o_.joint_pool : *o_.pool; }

  Options o_;
  const ModelConfig& c_;
  const ModelWeights& w_;
  const KernelTable& k_;
  int64_t heads_;     // of this rank
  int64_t kv_heads_;  // of this rank
  int64_t q_dim_;     // heads_ * head_dim
  int64_t kv_dim_;
  int64_t qkv_dim_;
  int64_t attn_dim_;  // heads_ * v_dim
  TensorParallel tp_;
  std::unique_ptr<MlaAttention> mla_;
  std::unique_ptr<MoeExperts> moe_;
  ContextAttention attention_;

  // Activations, [rows, ...]; grown on demand.
  int64_t rows_ = 0;
  bool solo_ = false;
  Buffer x_, normed_, qkv_, attn_, gate_up_, act_;
  Buffer logits_in_, logits_part_;
  std::vector<float> router_margins_;  // [rows], or empty
};

}  // namespace weft
