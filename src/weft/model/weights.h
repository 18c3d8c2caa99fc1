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
  std::vector<float> input_norm;      // [hidden]
  PackedWeights qkv;                  // [(heads + 2 kv_heads) * head_dim, hidden], this rank's heads: q, k, v
  std::vector<float> qkv_bias;        // or empty
  std::vector<float> q_norm, k_norm;  // [head_dim] or empty
  PackedWeights o;                    // [hidden, heads * head_dim]
  std::vector<float> o_bias;          // on TP rank 0 only: the all-reduce adds it once
  std::vector<float> post_norm;       // [hidden]
  PackedWeights gate_up;              // [2 * ffn, hidden], this rank's slice: gate, up
  std::vector<float> gate_up_bias;
  PackedWeights down;  // [hidden, ffn]
  std::vector<float> down_bias;
};

struct ModelWeights {
  DType dtype = DType::kBF16;
  // This rank's slice.
  int64_t heads = 0;
  int64_t kv_heads = 0;  // at least 1: with TP > kv_heads, TP / kv_heads ranks hold the same one
  int64_t ffn = 0;
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

}  // namespace weft
