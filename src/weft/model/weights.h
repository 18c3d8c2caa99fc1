#pragma once
// The weights that one tensor-parallel rank computes with. PCP ranks with the same TP index hold the same slice and,
// being threads of one process, share one copy.

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "weft/core/thread_pool.h"
#include "weft/kernels/table.h"
#include "weft/model/checkpoint.h"

namespace weft {

// Part `index` of [0, n) cut into `parts` as evenly as it goes.
struct Range {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t size() const { return end - begin; }
};
constexpr Range SplitRange(int64_t n, int64_t parts, int64_t index) {
  return {n * index / parts, n * (index + 1) / parts};
}

struct LayerWeights {
  std::vector<float> input_norm;  // [hidden]
  // [(heads + 2 kv_heads) * head_dim, hidden], this rank's heads: q, k, v. With MLA
  //   [q_lora + kv_lora + rope, hidden], the same on all TP ranks, or without q_lora_rank
  //   [heads * (nope + rope) + kv_lora + rope, hidden], this rank's heads: q of every head (nope, rope), latent,
  //   k_rope.
  PackedWeights qkv;
  std::vector<float> qkv_bias;        // of the rows of qkv, or empty
  std::vector<float> q_norm, k_norm;  // [head_dim] or empty
  PackedWeights o;                    // [hidden, heads * v_dim]
  std::vector<float> o_bias;          // on TP rank 0 only: the all-reduce adds it once
  std::vector<float> post_norm;       // [hidden]
  // The dense MLP; in an MoE layer the shared expert, with n = 0 where there is none.
  PackedWeights gate_up;  // [2 * ffn, hidden], this rank's slice: gate, up; ffn = down.k
  std::vector<float> gate_up_bias;
  PackedWeights down;  // [hidden, ffn]
  std::vector<float> down_bias;

  // MLA. Both norms use MlaConfig::kNormEps.
  std::vector<float> q_a_norm;   // [q_lora] or empty
  std::vector<float> kv_a_norm;  // [kv_lora]
  PackedWeights q_b;             // [heads * (nope + rope), q_lora] with q_lora_rank: q of this rank's heads
  // Per head of this rank, from kv_b_proj: k_nope = k_up . latent [nope, kv_lora] and v = v_up . latent
  // [v_dim, kv_lora]; k_absorb = k_up^T [kv_lora, nope] turns a query's nope part into one against the latent.
  std::vector<PackedWeights> k_up, v_up, k_absorb;

  // MoE layers.
  PackedWeights router;                // [experts, hidden], kF32 where MoeConfig::router_f32 says so
  std::vector<float> correction_bias;  // [experts] or empty
  std::vector<float> shared_gate;      // [hidden] (Qwen2-MoE) or empty
};

struct ModelWeights {
  DType dtype = DType::kBF16;
  // This rank's slice.
  int64_t heads = 0;
  int64_t kv_heads = 0;    // at least 1: with TP > kv_heads, TP / kv_heads ranks hold the same one
  int64_t ffn = 0;         // of dense MLPs
  int64_t shared_ffn = 0;  // of the shared expert of MoE layers
  Range vocab;

  // Rows vocab.begin .. vocab.end of the LM head; of the embedding too when `embedding.n` is 0 (tied).
  PackedWeights lm_head;
  PackedWeights embedding;
  std::vector<float> final_norm;  // [hidden]
  std::vector<LayerWeights> layers;

  const PackedWeights& embedding_rows() const { return embedding.n == 0 ? lm_head : embedding; }
  int64_t bytes() const;
};

// Loads rank `tp` of `tp_size`'s slice as `dtype` (kBF16 or kF32); only its bytes of the files are read. `on_bytes` is
// told of the bytes as they are done, from any thread of the pool. Throws weft::Error naming a missing tensor or a
// tensor whose shape does not fit the config.
std::shared_ptr<const ModelWeights> LoadWeights(const Checkpoint& checkpoint, int tp_size, int tp, DType dtype,
                                                const KernelTable& kernels, ThreadPool& pool,
                                                const std::function<void(int64_t)>& on_bytes);

// Which part of the routed experts a rank holds: TP cuts the width of each expert, expert parallelism gives each rank
// a range of whole ones (tp_size 1).
struct ExpertSlice {
  Range experts;
  int tp_size = 1;
  int tp = 0;
};

struct ExpertMlp {
  PackedWeights gate_up;  // [2 * ffn, hidden]: gate, up
  PackedWeights down;     // [hidden, ffn]
};

struct ExpertWeights {
  Range experts;
  int64_t ffn = 0;                             // of each expert, this rank's slice
  std::vector<std::vector<ExpertMlp>> layers;  // [layer][expert - experts.begin]; empty for dense layers
  int64_t bytes() const;
};

// Loads the routed experts of all MoE layers that `slice` names, apart from the other weights, since ranks that share
// those may hold different experts. Null for a model without experts. Otherwise as LoadWeights.
std::shared_ptr<const ExpertWeights> LoadExperts(const Checkpoint& checkpoint, const ExpertSlice& slice, DType dtype,
                                                 const KernelTable& kernels, ThreadPool& pool,
                                                 const std::function<void(int64_t)>& on_bytes);

// Bytes of one copy of all weights in memory when loaded as `dtype`: all ranks together, without what they hold twice.
int64_t WeightBytes(const ModelConfig& config, DType dtype);

}  // namespace weft
