#pragma once
// The kernels of one backend, behind one table of functions. `ref` is the scalar oracle, `cpu` the SIMD one; the same
// tests run on every table. Activations are f32, row-major; strides are in elements. A kernel may use every thread of
// the pool and returns when its result is complete. Arguments are checked by the caller: kernels do not throw.

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "weft/core/buffer.h"
#include "weft/core/dtype.h"
#include "weft/core/thread_pool.h"

namespace weft {

// A weight matrix W [n, k] of y = x W^T, stored in panels of kPanel output columns: element (j, p) of the matrix lies
// in panel j / kPanel; the last panel is padded with zeros. What lies inside a panel is the table's own business
// (pack_weights makes it, linear reads it): a decode step streams it once, a prefill step unpacks it per cache block.
struct PackedWeights {
  static constexpr int64_t kPanel = 16;
  DType dtype = DType::kBF16;  // kBF16 or kF32
  int64_t n = 0;               // output features
  int64_t k = 0;               // input features
  Buffer data;
};

struct LinearArgs {
  const float* x = nullptr;  // [m, k]
  int64_t x_stride = 0;
  int64_t m = 0;
  const PackedWeights* w = nullptr;
  const float* bias = nullptr;  // [n] or null
  float* y = nullptr;           // [m, n]
  int64_t y_stride = 0;
  bool accumulate = false;  // y += instead of y =
};

// The keys and values that one group of query rows attends to on one KV shard: either pages of the paged cache
// (block_table given) or contiguous rows (block_table null; block_tokens is then ignored). Key j of the shard lies in
// block block_table[j / block_tokens], row j % block_tokens.
struct KvPages {
  // Element (block, kv head h, row, d) at block * k_block_stride + h * k_head_stride + row * k_row_stride + d.
  const void* k = nullptr;
  // The same with the strides of v. May overlap k: in the latent form of MLA the value of a key is the first v_dim
  // elements of its row (v == k with k's strides); it is then read from memory once.
  const void* v = nullptr;
  DType dtype = DType::kBF16;
  const int32_t* block_table = nullptr;
  int32_t block_tokens = 0;
  int64_t k_block_stride = 0;
  int64_t k_head_stride = 0;
  int64_t v_block_stride = 0;
  int64_t v_head_stride = 0;
  int64_t k_row_stride = 0;  // between rows of a head; 0: k_dim
  int64_t v_row_stride = 0;  // 0: v_dim
  // [rows] keys visible to each query row: keys 0 .. visible[row]-1. Never falls from row to row. This is the causal
  // mask: on the one shard of a one-rank run it is position + 1, on W shards cp::LocalLen(position + 1, shard).
  const int32_t* visible = nullptr;
};

// Query rows of one request that see the same KV pages.
struct AttentionTask {
  const float* q = nullptr;  // [rows, q_heads, k_dim], heads of a row contiguous
  int64_t q_stride = 0;      // between rows
  float* out = nullptr;      // [rows, q_heads, v_dim], normalised over everything in `kv`
  int64_t out_stride = 0;
  float* lse = nullptr;  // [rows, q_heads] log-sum-exp of the scaled scores, natural log; may be null
  int64_t lse_stride = 0;
  int64_t rows = 0;
  std::span<const KvPages> kv;  // attended together, as one softmax; a row that sees no key gives out = 0, lse = -inf
};

struct AttentionArgs {
  std::span<const AttentionTask> tasks;
  int q_heads = 0;  // multiple of kv_heads; query head h reads KV head h / (q_heads / kv_heads)
  int kv_heads = 0;
  int k_dim = 0;
  int v_dim = 0;
  float scale = 1.0f;
};

// Rows to be stored into the paged cache (one layer of one shard).
struct KvWriteArgs {
  const float* k = nullptr;  // [rows, kv_heads, k_dim]
  int64_t k_stride = 0;
  const float* v = nullptr;  // [rows, kv_heads, v_dim]; null where there is no value cache (MLA)
  int64_t v_stride = 0;
  // [rows] slot = block * block_tokens + offset, or -1: this shard does not own the row.
  const int64_t* slots = nullptr;
  int64_t rows = 0;
  int kv_heads = 0;
  int k_dim = 0;
  int v_dim = 0;
  int32_t block_tokens = 0;
  void* k_cache = nullptr;  // [blocks, kv_heads, block_tokens, k_dim]
  void* v_cache = nullptr;  // [blocks, kv_heads, block_tokens, v_dim]
  DType dtype = DType::kBF16;
};

// Partial attention results over `shards` disjoint sets of keys, to be merged (context_parallel: O, LSE -> O, LSE):
//   m = max LSE_i, w_i = exp(LSE_i - m), O = sum(w_i O_i) / sum(w_i); all LSE_i = -inf gives O = 0.
struct MergeArgs {
  std::span<const float* const> out;  // shards x [rows, heads, dim]
  std::span<const float* const> lse;  // shards x [rows, heads]
  int64_t rows = 0;
  int64_t heads = 0;
  int64_t dim = 0;
  int64_t out_row_stride = 0;  // of the partial results
  int64_t lse_row_stride = 0;
  float* merged = nullptr;  // [rows, heads, dim]
  int64_t merged_row_stride = 0;
  float* merged_lse = nullptr;  // [rows, heads] contiguous, or null
};

struct RopeArgs {
  float* x = nullptr;  // [rows, heads, head_dim], rotated in place
  int64_t row_stride = 0;
  int64_t head_stride = 0;
  int64_t rows = 0;
  int64_t heads = 0;
  int64_t rotary_dim = 0;              // the first rotary_dim elements of a head are rotated
  const int32_t* positions = nullptr;  // [rows]
  const float* cos_sin = nullptr;      // [positions, rotary_dim]: rotary_dim/2 cosines, then rotary_dim/2 sines
  bool interleaved = false;            // pairs (2d, 2d+1) instead of (d, d + rotary_dim/2)
};

struct KernelTable {
  std::string_view name;    // "ref", "cpu"
  std::string_view target;  // what was chosen at run time, e.g. "AVX2", "AVX3"; "scalar" for ref

  // Packs rows [0, n) x columns [0, k) of a row-major source (f32 or bf16, src_stride elements between rows) into `w`,
  // whose dtype, n and k are set and whose data this allocates. row0 as in: pack piece by piece while loading, rows
  // row0 .. row0 + rows of w at a time (row0 a multiple of kPanel); the first call allocates.
  void (*pack_weights)(const void* src, DType src_dtype, int64_t src_stride, int64_t row0, int64_t rows,
                       PackedWeights& w);
  // The rows of W back as f32 (tests, and embeddings that share the LM head's weights).
  void (*unpack_row)(const PackedWeights& w, int64_t row, float* out);

  void (*linear)(const LinearArgs& args, ThreadPool& pool);
  // Many independent products as one parallel job, each with its own x, m (0 too), weights and y: the experts of an MoE
  // layer, the heads of MLA. No y may overlap another one's or any x; x may be shared.
  void (*linear_many)(std::span<const LinearArgs> args, ThreadPool& pool);

  // y = x / sqrt(mean(x^2) + eps) * weight. In place (y == x) allowed.
  void (*rms_norm)(const float* x, int64_t x_stride, const float* weight, float eps, float* y, int64_t y_stride,
                   int64_t rows, int64_t cols, ThreadPool& pool);
  // x += delta over [rows, cols].
  void (*add)(float* x, int64_t x_stride, const float* delta, int64_t delta_stride, int64_t rows, int64_t cols,
              ThreadPool& pool);
  // out = silu(gate) * up, all [rows, cols].
  void (*swiglu)(const float* gate, int64_t gate_stride, const float* up, int64_t up_stride, float* out,
                 int64_t out_stride, int64_t rows, int64_t cols, ThreadPool& pool);
  void (*rope)(const RopeArgs& args, ThreadPool& pool);
  // out[row] = sum over parts of parts[p][row * stride ...]: the reduction of an all-reduce, in the order of the parts.
  void (*sum_parts)(std::span<const float* const> parts, int64_t count, float* out, ThreadPool& pool);

  void (*kv_write)(const KvWriteArgs& args, ThreadPool& pool);
  void (*attention)(const AttentionArgs& args, ThreadPool& pool);
  void (*merge)(const MergeArgs& args, ThreadPool& pool);

  // Index of the largest element, the lowest one on a tie.
  int64_t (*argmax)(const float* x, int64_t n);
  // log(sum(exp(x))), exact for large |x|; -inf entries allowed; not finite if any entry is NaN.
  float (*log_sum_exp)(const float* x, int64_t n);
  // x = exp((x - max) ) / sum, in place; returns nothing. -inf entries become 0.
  void (*softmax)(float* x, int64_t n);
};

// The scalar oracle.
const KernelTable& RefKernels();
// SIMD, the best target of this machine.
const KernelTable& CpuKernels();
// "auto" (= cpu), "cpu" or "ref"; throws weft::Error on another name.
const KernelTable& KernelsByName(std::string_view name);

}  // namespace weft
