#pragma once
// The model graph of one rank: Llama, Qwen2 and Qwen3 dense families, driven by ModelConfig.

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "weft/core/buffer.h"
#include "weft/core/thread_pool.h"
#include "weft/cp/grid.h"
#include "weft/kernels/table.h"
#include "weft/model/config.h"
#include "weft/model/forward_batch.h"
#include "weft/model/kv_cache.h"
#include "weft/model/weights.h"
#include "weft/parallel/communicator.h"

namespace weft {

// cos and sin of every position up to max_position, shared by all ranks: [positions, rotary_dim], cosines then sines.
class RopeCache {
 public:
  RopeCache(const RopeConfig& rope, int64_t rotary_dim, int64_t max_position);
  const float* data() const { return values_.as<float>(); }

 private:
  Buffer values_;
};

// The groups that one rank exchanges with; index in each as cp::RankCoord says.
struct ForwardGroups {
  Communicator* tp = nullptr;
  Communicator* pcp = nullptr;
  Communicator* dcp = nullptr;
  Communicator* cp = nullptr;  // all KV shards of this rank's KV heads
};

class Transformer {
 public:
  struct Options {
    const ModelConfig* config = nullptr;
    std::shared_ptr<const ModelWeights> weights;
    std::shared_ptr<const RopeCache> rope;
    KvCache* cache = nullptr;
    cp::ParallelConfig parallel;
    cp::RankCoord coord;
    ForwardGroups groups;
    const KernelTable* kernels = nullptr;
    ThreadPool* pool = nullptr;
    ThreadPool* joint_pool = nullptr;  // on PCP rank 0: as many threads as its PCP group has
  };
  // Collective: every rank of the groups constructs its own at the same time.
  explicit Transformer(Options options);

  // Runs all layers; the residual stream of every row stays until the next call. Collective over all ranks, or, where
  // batch.solo is set, over those of PCP rank 0, with all threads of their PCP group.
  void Forward(const ForwardBatch& batch);

  // Logits [rows.size(), vocab_size] of some rows of the last Forward. Collective over the TP group, with the same rows
  // on all of it; complete on TP rank 0, whose `logits` alone is written (others may pass null).
  void Logits(std::span<const int64_t> rows, float* logits);

 private:
  void Embed(const ForwardBatch& batch);
  void PrepareAttention(const ForwardBatch& batch);
  void Attention(const ForwardBatch& batch, int64_t layer);
  void StoreKv(const ForwardBatch& batch, int64_t layer);
  AttentionArgs AttentionOver(std::span<const AttentionTask> tasks, int64_t q_heads) const;
  void GatherKvAttention(int64_t layer);
  void GatherQAttention(const ForwardBatch& batch, int64_t layer);
  // x += the sum over the TP group of W y (+ bias); `w` is this rank's slice of the input features.
  void RowParallel(const float* y, int64_t y_stride, const PackedWeights& w, const std::vector<float>& bias,
                   int64_t row0, int64_t rows);
  // x[row0 ...] += sum over the TP group of partial() rows.
  void AddReduced(int64_t row0, int64_t rows);

  float* Partial() { return partial_[parity_].as<float>(); }
  void Toggle() { parity_ ^= 1; }
  // The threads and the group of the current step.
  ThreadPool& pool() const { return solo_ ? *o_.joint_pool : *o_.pool; }
  Communicator& exchange() const { return solo_ ? *o_.groups.dcp : *o_.groups.cp; }

  Options o_;
  const ModelConfig& c_;
  const ModelWeights& w_;
  const KernelTable& k_;
  int64_t heads_;     // of this rank
  int64_t kv_heads_;  // of this rank
  int64_t q_dim_;     // heads_ * head_dim
  int64_t kv_dim_;
  int64_t qkv_dim_;
  int32_t shards_;
  int32_t dcp_;
  // Views of the peers' memory: of the CP group by shard, of the PCP group by PCP rank.
  std::vector<const KvCache*> shard_caches_, pcp_caches_;

  // Activations, [rows, ...]; grown on demand.
  int64_t rows_ = 0;
  bool solo_ = false;
  Buffer x_, normed_, qkv_, attn_, gate_up_, act_;
  // What peers read lies in one of two buffers by turns: when a rank comes to use the first one again, every peer has
  // entered the collective in between and is done with it.
  Buffer partial_[2], reduced_[2], gather_q_part_[2];
  int parity_ = 0;
  int gather_q_parity_ = 0;
  Buffer gathered_q_;
  Buffer logits_in_, logits_part_;

  // Of the current step, the same for all layers but for the cache pointers.
  std::vector<KvPages> gather_kv_pages_, gather_q_pages_;
  std::vector<AttentionTask> gather_kv_tasks_, gather_q_tasks_;
};

}  // namespace weft
