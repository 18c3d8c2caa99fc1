#include "weft/model/transformer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "weft/core/error.h"

namespace weft {
namespace {

// The MLP runs over this many rows at a time, so that gate and up (2 * ffn floats a row) stay in the last-level cache.
constexpr int64_t kMlpRows = 1024;

void ReserveFloats(Buffer& buffer, int64_t n) { buffer.Reserve(static_cast<size_t>(n) * sizeof(float)); }

}  // namespace

RopeCache::RopeCache(const RopeConfig& rope, int64_t rotary_dim, int64_t max_position)
    : values_(static_cast<size_t>(max_position * rotary_dim) * sizeof(float)) {
  const RopeTable table = MakeRopeTable(rope, rotary_dim);
  const auto half = static_cast<size_t>(rotary_dim / 2);
  for (int64_t position = 0; position < max_position; ++position) {
    float* row = values_.as<float>() + position * rotary_dim;
    for (size_t d = 0; d < half; ++d) {
      const double angle = static_cast<double>(position) * table.inv_freq[d];
      row[d] = static_cast<float>(std::cos(angle) * table.attention_factor);
      row[half + d] = static_cast<float>(std::sin(angle) * table.attention_factor);
    }
  }
}

namespace {

ContextAttention::Options AttentionOptions(const Transformer::Options& o, KvExpansion* expansion) {
  const ModelConfig& c = *o.config;
  return {.cache = o.cache,
          .parallel = o.parallel,
          .coord = o.coord,
          .groups = o.groups,
          .kernels = o.kernels,
          .heads = o.weights->heads,
          .v_dim = c.mla ? c.mla->kv_lora_rank : c.head_dim,
          .scale = static_cast<float>(c.attention_scale()),
          .expansion = expansion,
          .segment_tokens = o.context_segment_tokens,
          .stream = o.stream};
}

}  // namespace

Transformer::Transformer(Options options)
    : o_(std::move(options)),
      c_(*o_.config),
      w_(*o_.weights),
      k_(*o_.kernels),
      heads_(w_.heads),
      kv_heads_(w_.kv_heads),
      q_dim_(w_.heads * c_.head_dim),
      kv_dim_(w_.kv_heads * c_.head_dim),
      qkv_dim_(q_dim_ + 2 * kv_dim_),
      attn_dim_(heads_ * c_.v_dim()),
      tp_(*o_.groups.tp, k_, c_.hidden_size),
      mla_(c_.mla ? std::make_unique<MlaAttention>(c_, w_, k_, o_.rope->data()) : nullptr),
      attention_(AttentionOptions(o_, mla_.get())) {
  if (mla_) qkv_dim_ = mla_->qkv_dim();
  if (c_.moe) {
    moe_ = std::make_unique<MoeExperts>(MoeExperts::Options{.config = &c_,
                                                            .weights = &w_,
                                                            .experts = o_.experts,
                                                            .kernels = &k_,
                                                            .tp = o_.groups.tp,
                                                            .world = o_.expert_parallel ? o_.groups.world : nullptr,
                                                            .stream = o_.stream});
  }
}

void Transformer::Forward(const ForwardBatch& batch) {
  rows_ = batch.rows;
  solo_ = batch.solo;
  WEFT_CHECK(!solo_ || (o_.coord.pcp == 0 && o_.joint_pool != nullptr && !o_.expert_parallel));
  const int64_t hidden = c_.hidden_size;
  ReserveFloats(x_, rows_ * hidden);
  ReserveFloats(normed_, rows_ * hidden);
  ReserveFloats(qkv_, rows_ * qkv_dim_);
  ReserveFloats(attn_, rows_ * attn_dim_);

  router_margins_.assign(batch.router_margins && c_.moe ? static_cast<size_t>(rows_) : 0,
                         std::numeric_limits<float>::infinity());

  Embed(batch);
  attention_.Begin(batch, pool());
  float* x = x_.as<float>();
  float* normed = normed_.as<float>();
  for (int64_t layer = 0; layer < c_.num_layers; ++layer) {
    const LayerWeights& w = w_.layers[static_cast<size_t>(layer)];
    k_.rms_norm(x, hidden, w.input_norm.data(), c_.rms_norm_eps, normed, hidden, rows_, hidden, pool());
    Attention(batch, layer);
    RowParallel(attn_.as<float>(), attn_dim_, w.o, w.o_bias, 0, rows_);
    k_.rms_norm(x, hidden, w.post_norm.data(), c_.rms_norm_eps, normed, hidden, rows_, hidden, pool());
    if (c_.IsMoe(layer)) {
      MoeMlp(layer, batch.most_rows);
    } else {
      DenseMlp(layer);
    }
  }
}

void Transformer::Attention(const ForwardBatch& batch, int64_t layer) {
  const LayerWeights& w = w_.layers[static_cast<size_t>(layer)];
  float* q = qkv_.as<float>();
  k_.linear({.x = normed_.as<float>(),
             .x_stride = c_.hidden_size,
             .m = rows_,
             .w = &w.qkv,
             .bias = w.qkv_bias.empty() ? nullptr : w.qkv_bias.data(),
             .y = q,
             .y_stride = qkv_dim_},
            pool());
  if (mla_) {
    mla_->Run(batch, layer, q, attn_.as<float>(), attention_, pool());
    return;
  }
  if (c_.qk_norm) {
    // Per head: one head of all rows is a matrix of head_dim columns whose rows are qkv_dim_ apart.
    for (int64_t head = 0; head < heads_ + kv_heads_; ++head) {
      const float* weight = head < heads_ ? w.q_norm.data() : w.k_norm.data();
      float* values = q + head * c_.head_dim;
      k_.rms_norm(values, qkv_dim_, weight, c_.rms_norm_eps, values, qkv_dim_, rows_, c_.head_dim, pool());
    }
  }
  // q and k heads lie one behind the other.
  k_.rope({.x = q,
           .row_stride = qkv_dim_,
           .head_stride = c_.head_dim,
           .rows = rows_,
           .heads = heads_ + kv_heads_,
           .rotary_dim = c_.rotary_dim,
           .positions = batch.positions.data(),
           .cos_sin = o_.rope->data(),
           .interleaved = c_.rope_interleaved},
          pool());
  const int64_t first = batch.gather_kv_rows;
  attention_.Run(layer, {.k = q + q_dim_,
                         .v = q + q_dim_ + kv_dim_,
                         .kv_stride = qkv_dim_,
                         .gather_kv_q = q,
                         .gather_kv_q_stride = qkv_dim_,
                         .gather_kv_out = attn_.as<float>(),
                         .gather_q_q = q + first * qkv_dim_,
                         .gather_q_q_stride = qkv_dim_,
                         .gather_q_out = attn_.as<float>() + first * q_dim_});
}

void Transformer::Mlp(const LayerWeights& w, int64_t ffn, int64_t row0, int64_t rows, float* y, bool accumulate) {
  const int64_t hidden = c_.hidden_size;
  ReserveFloats(gate_up_, rows * 2 * ffn);
  ReserveFloats(act_, rows * ffn);
  const float* x = normed_.as<float>() + row0 * hidden;
  float* gate_up = gate_up_.as<float>();
  float* act = act_.as<float>();
  k_.linear({.x = x,
             .x_stride = hidden,
             .m = rows,
             .w = &w.gate_up,
             .bias = w.gate_up_bias.empty() ? nullptr : w.gate_up_bias.data(),
             .y = gate_up,
             .y_stride = 2 * ffn},
            pool());
  k_.swiglu(gate_up, 2 * ffn, gate_up + ffn, 2 * ffn, act, ffn, rows, ffn, pool());
  if (!w.shared_gate.empty()) {
    // The gate is on the output, which is linear in the activations.
    for (int64_t row = 0; row < rows; ++row) {
      double dot = 0;
      for (int64_t d = 0; d < hidden; ++d) {
        dot += static_cast<double>(x[row * hidden + d]) * w.shared_gate[static_cast<size_t>(d)];
      }
      const auto gate = static_cast<float>(1.0 / (1.0 + std::exp(-dot)));
      for (int64_t d = 0; d < ffn; ++d) act[row * ffn + d] *= gate;
    }
  }
  k_.linear({.x = act,
             .x_stride = ffn,
             .m = rows,
             .w = &w.down,
             .bias = w.down_bias.empty() ? nullptr : w.down_bias.data(),
             .y = y,
             .y_stride = hidden,
             .accumulate = accumulate},
            pool());
}

void Transformer::DenseMlp(int64_t layer) {
  const LayerWeights& w = w_.layers[static_cast<size_t>(layer)];
  float* x = x_.as<float>();
  // Ranks of a TP group have the same rows, hence the same tiles and the same number of exchanges.
  for (int64_t row0 = 0; row0 < rows_; row0 += kMlpRows) {
    const int64_t rows = std::min(kMlpRows, rows_ - row0);
    float* to = x + row0 * c_.hidden_size;
    Mlp(w, w_.ffn, row0, rows, tp_.split() ? tp_.Partial(rows) : to, !tp_.split());
    if (tp_.split()) tp_.AddReduced(to, rows, pool());
  }
}

void Transformer::MoeMlp(int64_t layer, int64_t most_rows) {
  const LayerWeights& w = w_.layers[static_cast<size_t>(layer)];
  const int64_t hidden = c_.hidden_size;
  const int64_t tile = moe_->tile_rows();
  // With expert parallelism all ranks take part in all tiles.
  const int64_t end = o_.expert_parallel ? most_rows : rows_;
  for (int64_t row0 = 0; row0 < end; row0 += tile) {
    const int64_t rows = std::clamp<int64_t>(rows_ - row0, 0, tile);
    const int64_t at = std::min(row0, rows_);
    float* x = x_.as<float>() + at * hidden;
    float* to = tp_.split() ? tp_.Partial(rows) : x;
    if (w.gate_up.n > 0) {
      for (int64_t i = 0; i < rows; i += kMlpRows) {
        Mlp(w, w_.shared_ffn, at + i, std::min(kMlpRows, rows - i), to + i * hidden, !tp_.split());
      }
    } else if (tp_.split() && rows > 0) {
      std::memset(to, 0, static_cast<size_t>(rows * hidden) * sizeof(float));
    }
    float* margins = router_margins_.empty() ? nullptr : router_margins_.data() + at;
    moe_->Run(layer, normed_.as<float>() + at * hidden, rows, to, pool(), margins);
    if (tp_.split() && rows > 0) tp_.AddReduced(x, rows, pool());
  }
}

void Transformer::Embed(const ForwardBatch& batch) {
  const int64_t hidden = c_.hidden_size;
  float* out = tp_.split() ? tp_.Partial(rows_) : x_.as<float>();
  pool().ParallelFor(rows_, 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t token = batch.token_ids[static_cast<size_t>(row)];
      if (token >= w_.vocab.begin && token < w_.vocab.end) {
        k_.unpack_row(w_.embedding_rows(), token - w_.vocab.begin, out + row * hidden);
      } else {
        std::memset(out + row * hidden, 0, static_cast<size_t>(hidden) * sizeof(float));
      }
    }
  });
  if (!tp_.split() || rows_ == 0) return;  // TP peers have the same rows: all of them go on, or none
  std::memset(x_.data(), 0, static_cast<size_t>(rows_ * hidden) * sizeof(float));
  tp_.AddReduced(x_.as<float>(), rows_, pool());
}

void Transformer::RowParallel(const float* y, int64_t y_stride, const PackedWeights& w, const std::vector<float>& bias,
                              int64_t row0, int64_t rows) {
  const int64_t hidden = c_.hidden_size;
  float* x = x_.as<float>() + row0 * hidden;
  k_.linear({.x = y,
             .x_stride = y_stride,
             .m = rows,
             .w = &w,
             .bias = bias.empty() ? nullptr : bias.data(),
             .y = tp_.split() ? tp_.Partial(rows) : x,
             .y_stride = hidden,
             .accumulate = !tp_.split()},
            pool());
  if (tp_.split()) tp_.AddReduced(x, rows, pool());
}

void Transformer::Logits(std::span<const int64_t> rows, float* logits) {
  const int64_t hidden = c_.hidden_size;
  const auto n = static_cast<int64_t>(rows.size());
  if (n == 0) return;
  ReserveFloats(logits_in_, n * hidden);
  float* in = logits_in_.as<float>();
  for (int64_t i = 0; i < n; ++i) {
    std::memcpy(in + i * hidden, x_.as<float>() + rows[static_cast<size_t>(i)] * hidden,
                static_cast<size_t>(hidden) * sizeof(float));
  }
  k_.rms_norm(in, hidden, w_.final_norm.data(), c_.rms_norm_eps, in, hidden, n, hidden, pool());
  Communicator& tp = *o_.groups.tp;
  LinearArgs args{.x = in, .x_stride = hidden, .m = n, .w = &w_.lm_head, .y = logits, .y_stride = c_.vocab_size};
  if (tp.size() == 1) {
    k_.linear(args, pool());
    return;
  }
  const int64_t part = w_.vocab.size();
  ReserveFloats(logits_part_, n * part);
  args.y = logits_part_.as<float>();
  args.y_stride = part;
  k_.linear(args, pool());
  std::vector<size_t> sizes;
  for (int member = 0; member < tp.size(); ++member) {
    sizes.push_back(static_cast<size_t>(n * SplitRange(c_.vocab_size, tp.size(), member).size()) * sizeof(float));
  }
  std::vector<std::span<const float>> parts;
  tp.StartAllGather(std::as_bytes(std::span<const float>(args.y, static_cast<size_t>(n * part))), sizes);
  tp.FinishAllGather(parts);
  if (tp.rank() == 0) {
    for (int member = 0; member < tp.size(); ++member) {
      const Range vocab = SplitRange(c_.vocab_size, tp.size(), member);
      for (int64_t i = 0; i < n; ++i) {
        std::memcpy(logits + i * c_.vocab_size + vocab.begin,
                    parts[static_cast<size_t>(member)].data() + i * vocab.size(),
                    static_cast<size_t>(vocab.size()) * sizeof(float));
      }
    }
  }
  tp.Release();  // the next tile of rows overwrites logits_part_
}

}  // namespace weft
