// The scalar oracle: every kernel of the table written the obvious way, sums in double. Single-threaded on purpose.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "weft/core/error.h"
#include "weft/kernels/table.h"

namespace weft {
namespace {

constexpr int64_t kPanel = PackedWeights::kPanel;
constexpr float kInf = std::numeric_limits<float>::infinity();

float LoadElement(const void* data, DType dtype, int64_t i) {
  return dtype == DType::kBF16 ? ToFloat(static_cast<const bf16*>(data)[i]) : static_cast<const float*>(data)[i];
}

void StoreElement(void* data, DType dtype, int64_t i, float value) {
  if (dtype == DType::kBF16) {
    static_cast<bf16*>(data)[i] = ToBf16(value);
  } else {
    static_cast<float*>(data)[i] = value;
  }
}

// This table's panels are [panel][k][kPanel].
int64_t PackedIndex(const PackedWeights& w, int64_t row, int64_t col) {
  return (row / kPanel * w.k + col) * kPanel + row % kPanel;
}

void PackWeights(const void* src, DType src_dtype, int64_t src_stride, int64_t row0, int64_t rows, PackedWeights& w) {
  WEFT_CHECK(src_dtype == DType::kF32 || src_dtype == DType::kBF16);
  WEFT_CHECK(w.dtype == DType::kF32 || w.dtype == DType::kBF16);
  WEFT_CHECK(row0 % kPanel == 0 && row0 + rows <= w.n, "rows {} + {} of {}", row0, rows, w.n);
  w.data.Reserve(static_cast<size_t>((w.n + kPanel - 1) / kPanel * kPanel * w.k) * SizeOf(w.dtype));
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < w.k; ++col) {
      StoreElement(w.data.data(), w.dtype, PackedIndex(w, row0 + row, col),
                   LoadElement(src, src_dtype, row * src_stride + col));
    }
  }
}

void UnpackRow(const PackedWeights& w, int64_t row, float* out) {
  for (int64_t col = 0; col < w.k; ++col) out[col] = LoadElement(w.data.data(), w.dtype, PackedIndex(w, row, col));
}

void Linear(const LinearArgs& args, ThreadPool&) {
  const PackedWeights& w = *args.w;
  std::vector<double> sums(static_cast<size_t>(kPanel));
  for (int64_t n0 = 0; n0 < w.n; n0 += kPanel) {
    const int64_t columns = std::min(kPanel, w.n - n0);
    for (int64_t i = 0; i < args.m; ++i) {
      const float* x = args.x + i * args.x_stride;
      std::fill(sums.begin(), sums.end(), 0.0);
      for (int64_t p = 0; p < w.k; ++p) {
        for (int64_t j = 0; j < columns; ++j) {
          const double weight = LoadElement(w.data.data(), w.dtype, PackedIndex(w, n0 + j, p));
          sums[static_cast<size_t>(j)] += weight * x[p];
        }
      }
      float* y = args.y + i * args.y_stride + n0;
      for (int64_t j = 0; j < columns; ++j) {
        double sum = sums[static_cast<size_t>(j)];
        if (args.bias != nullptr) sum += args.bias[n0 + j];
        if (args.accumulate) sum += y[j];
        y[j] = static_cast<float>(sum);
      }
    }
  }
}

void LinearMany(std::span<const LinearArgs> args, ThreadPool& pool) {
  for (const LinearArgs& one : args) Linear(one, pool);
}

void RmsNorm(const float* x, int64_t x_stride, const float* weight, float eps, float* y, int64_t y_stride, int64_t rows,
             int64_t cols, ThreadPool&) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* in = x + i * x_stride;
    double squares = 0;
    for (int64_t c = 0; c < cols; ++c) squares += static_cast<double>(in[c]) * in[c];
    const double inverse = 1 / std::sqrt(squares / static_cast<double>(cols) + eps);
    for (int64_t c = 0; c < cols; ++c) y[i * y_stride + c] = static_cast<float>(in[c] * inverse * weight[c]);
  }
}

void Add(float* x, int64_t x_stride, const float* delta, int64_t delta_stride, int64_t rows, int64_t cols,
         ThreadPool&) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < cols; ++c) x[i * x_stride + c] += delta[i * delta_stride + c];
  }
}

void Swiglu(const float* gate, int64_t gate_stride, const float* up, int64_t up_stride, float* out, int64_t out_stride,
            int64_t rows, int64_t cols, ThreadPool&) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < cols; ++c) {
      const double g = gate[i * gate_stride + c];
      out[i * out_stride + c] = static_cast<float>(g / (1 + std::exp(-g)) * up[i * up_stride + c]);
    }
  }
}

void Rope(const RopeArgs& args, ThreadPool&) {
  const int64_t half = args.rotary_dim / 2;
  for (int64_t i = 0; i < args.rows; ++i) {
    const float* cosines = args.cos_sin + args.positions[i] * args.rotary_dim;
    const float* sines = cosines + half;
    for (int64_t h = 0; h < args.heads; ++h) {
      float* x = args.x + i * args.row_stride + h * args.head_stride;
      for (int64_t d = 0; d < half; ++d) {
        float& first = args.interleaved ? x[2 * d] : x[d];
        float& second = args.interleaved ? x[2 * d + 1] : x[d + half];
        const double a = first;
        const double b = second;
        first = static_cast<float>(a * cosines[d] - b * sines[d]);
        second = static_cast<float>(b * cosines[d] + a * sines[d]);
      }
    }
  }
}

void SumParts(std::span<const float* const> parts, int64_t count, float* out, ThreadPool&) {
  for (int64_t i = 0; i < count; ++i) {
    float sum = 0;
    for (const float* part : parts) sum += part[i];
    out[i] = sum;
  }
}

void KvWrite(const KvWriteArgs& args, ThreadPool&) {
  auto store = [&](const float* src, int64_t stride, void* cache, int dim) {
    for (int64_t i = 0; i < args.rows; ++i) {
      if (args.slots[i] < 0) continue;
      const int64_t block = args.slots[i] / args.block_tokens;
      const int64_t offset = args.slots[i] % args.block_tokens;
      for (int64_t h = 0; h < args.kv_heads; ++h) {
        for (int64_t d = 0; d < dim; ++d) {
          StoreElement(cache, args.dtype, ((block * args.kv_heads + h) * args.block_tokens + offset) * dim + d,
                       src[i * stride + h * dim + d]);
        }
      }
    }
  };
  store(args.k, args.k_stride, args.k_cache, args.k_dim);
  if (args.v != nullptr) store(args.v, args.v_stride, args.v_cache, args.v_dim);
}

// One query head of one row: softmax over every visible key of every shard, in two passes.
void AttendRow(const AttentionArgs& args, const AttentionTask& task, int64_t row, int head, std::vector<double>& scores,
               std::vector<double>& sums) {
  const int64_t kv_head = head / (args.q_heads / args.kv_heads);
  auto element = [&](const void* data, const KvPages& kv, int64_t key, int64_t block_stride, int64_t head_stride,
                     int64_t row_stride, int64_t d) {
    const int64_t block = kv.block_table != nullptr ? kv.block_table[key / kv.block_tokens] : 0;
    const int64_t offset = kv.block_table != nullptr ? key % kv.block_tokens : key;
    return LoadElement(data, kv.dtype, block * block_stride + kv_head * head_stride + offset * row_stride + d);
  };
  const float* q = task.q + row * task.q_stride + head * args.k_dim;
  auto k_at = [&](const KvPages& kv, int64_t key, int64_t d) {
    const int64_t row_stride = kv.k_row_stride != 0 ? kv.k_row_stride : args.k_dim;
    return element(kv.k, kv, key, kv.k_block_stride, kv.k_head_stride, row_stride, d);
  };
  auto v_at = [&](const KvPages& kv, int64_t key, int64_t d) {
    const int64_t row_stride = kv.v_row_stride != 0 ? kv.v_row_stride : args.v_dim;
    return element(kv.v, kv, key, kv.v_block_stride, kv.v_head_stride, row_stride, d);
  };
  scores.clear();
  double largest = -kInf;
  for (const KvPages& kv : task.kv) {
    for (int64_t key = 0; key < kv.visible[row]; ++key) {
      double dot = 0;
      for (int64_t d = 0; d < args.k_dim; ++d) {
        dot += static_cast<double>(q[d]) * k_at(kv, key, d);
      }
      scores.push_back(dot * args.scale);
      largest = std::max(largest, scores.back());
    }
  }
  sums.assign(static_cast<size_t>(args.v_dim), 0.0);
  double total = 0;
  size_t index = 0;
  for (const KvPages& kv : task.kv) {
    for (int64_t key = 0; key < kv.visible[row]; ++key) {
      const double p = std::exp(scores[index++] - largest);
      total += p;
      for (int64_t d = 0; d < args.v_dim; ++d) {
        sums[static_cast<size_t>(d)] += p * v_at(kv, key, d);
      }
    }
  }
  float* out = task.out + row * task.out_stride + head * args.v_dim;
  for (int64_t d = 0; d < args.v_dim; ++d) {
    out[d] = total > 0 ? static_cast<float>(sums[static_cast<size_t>(d)] / total) : 0.0f;
  }
  if (task.lse != nullptr) {
    task.lse[row * task.lse_stride + head] = total > 0 ? static_cast<float>(largest + std::log(total)) : -kInf;
  }
}

void Attention(const AttentionArgs& args, ThreadPool&) {
  std::vector<double> scores;
  std::vector<double> sums;
  for (const AttentionTask& task : args.tasks) {
    for (int64_t row = 0; row < task.rows; ++row) {
      for (int head = 0; head < args.q_heads; ++head) AttendRow(args, task, row, head, scores, sums);
    }
  }
}

void Merge(const MergeArgs& args, ThreadPool&) {
  const size_t shards = args.out.size();
  for (int64_t row = 0; row < args.rows; ++row) {
    for (int64_t head = 0; head < args.heads; ++head) {
      double largest = -kInf;
      for (size_t s = 0; s < shards; ++s) {
        largest = std::max<double>(largest, args.lse[s][row * args.lse_row_stride + head]);
      }
      double total = 0;
      std::vector<double> sums(static_cast<size_t>(args.dim), 0.0);
      for (size_t s = 0; s < shards; ++s) {
        const double lse = args.lse[s][row * args.lse_row_stride + head];
        if (lse == -kInf) continue;  // saw no key: whatever lies in its O does not count
        const double weight = std::exp(lse - largest);
        total += weight;
        const float* out = args.out[s] + row * args.out_row_stride + head * args.dim;
        for (int64_t d = 0; d < args.dim; ++d) sums[static_cast<size_t>(d)] += weight * out[d];
      }
      float* merged = args.merged + row * args.merged_row_stride + head * args.dim;
      for (int64_t d = 0; d < args.dim; ++d) {
        merged[d] = total > 0 ? static_cast<float>(sums[static_cast<size_t>(d)] / total) : 0.0f;
      }
      if (args.merged_lse != nullptr) {
        args.merged_lse[row * args.heads + head] = total > 0 ? static_cast<float>(largest + std::log(total)) : -kInf;
      }
    }
  }
}

int64_t Argmax(const float* x, int64_t n) { return std::max_element(x, x + n) - x; }

float LogSumExp(const float* x, int64_t n) {
  const float largest = n > 0 ? *std::max_element(x, x + n) : -kInf;
  if (std::isinf(largest)) return largest;
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += std::exp(static_cast<double>(x[i]) - largest);
  return static_cast<float>(largest + std::log(sum));
}

void Softmax(float* x, int64_t n) {
  const float largest = n > 0 ? *std::max_element(x, x + n) : -kInf;
  if (largest == -kInf) {
    std::fill(x, x + n, 0.0f);
    return;
  }
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += std::exp(static_cast<double>(x[i]) - largest);
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<float>(std::exp(static_cast<double>(x[i]) - largest) / sum);
}

}  // namespace

const KernelTable& RefKernels() {
  static constexpr KernelTable kTable = {
      .name = "ref",
      .target = "scalar",
      .pack_weights = PackWeights,
      .unpack_row = UnpackRow,
      .linear = Linear,
      .linear_many = LinearMany,
      .rms_norm = RmsNorm,
      .add = Add,
      .swiglu = Swiglu,
      .rope = Rope,
      .sum_parts = SumParts,
      .kv_write = KvWrite,
      .attention = Attention,
      .merge = Merge,
      .argmax = Argmax,
      .log_sum_exp = LogSumExp,
      .softmax = Softmax,
  };
  return kTable;
}

}  // namespace weft
