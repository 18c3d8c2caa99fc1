#include "weft/model/transformer.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "weft/core/error.h"

namespace weft {
namespace {

// The MLP runs over this many rows at a time, so that gate and up (2 * ffn floats a row) stay in the last-level cache.
constexpr int64_t kMlpRows = 1024;

// Up to this many rows every rank adds up all partial results by itself (one barrier); above, each adds up a share of
// the rows and the shares are gathered (two barriers, 1/TP of the additions).
constexpr int64_t kDirectReduceRows = 16;

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
      shards_(o_.parallel.KvShards()),
      dcp_(o_.parallel.decode_context_parallel) {
  WEFT_CHECK(o_.groups.cp->size() == shards_ && o_.groups.cp->rank() == o_.coord.kv_shard);
  // Every rank's cache is read in place, here and in the steps.
  auto gather = [&](Communicator& group, std::vector<const KvCache*>& caches) {
    WEFT_CHECK(group.shares_memory());
    const KvCache* mine = o_.cache;
    std::vector<std::span<const KvCache* const>> views;
    group.AllGather(std::span<const KvCache* const>(&mine, 1), views);
    for (const auto& view : views) caches.push_back(view[0]);
    group.Release();  // `mine` is about to go
  };
  gather(*o_.groups.cp, shard_caches_);
  gather(*o_.groups.pcp, pcp_caches_);
}

void Transformer::Forward(const ForwardBatch& batch) {
  rows_ = batch.rows;
  solo_ = batch.solo;
  WEFT_CHECK(!solo_ || (o_.coord.pcp == 0 && o_.joint_pool != nullptr));
  const int64_t hidden = c_.hidden_size;
  ReserveFloats(x_, rows_ * hidden);
  ReserveFloats(normed_, rows_ * hidden);
  ReserveFloats(qkv_, rows_ * qkv_dim_);
  ReserveFloats(attn_, rows_ * q_dim_);
  const int64_t mlp_rows = std::min(rows_, kMlpRows);
  ReserveFloats(gate_up_, mlp_rows * 2 * w_.ffn);
  ReserveFloats(act_, mlp_rows * w_.ffn);

  Embed(batch);
  PrepareAttention(batch);
  float* x = x_.as<float>();
  float* normed = normed_.as<float>();
  for (int64_t layer = 0; layer < c_.num_layers; ++layer) {
    const LayerWeights& w = w_.layers[static_cast<size_t>(layer)];
    k_.rms_norm(x, hidden, w.input_norm.data(), c_.rms_norm_eps, normed, hidden, rows_, hidden, pool());
    k_.linear({.x = normed,
               .x_stride = hidden,
               .m = rows_,
               .w = &w.qkv,
               .bias = w.qkv_bias.empty() ? nullptr : w.qkv_bias.data(),
               .y = qkv_.as<float>(),
               .y_stride = qkv_dim_},
              pool());
    Attention(batch, layer);
    RowParallel(attn_.as<float>(), q_dim_, w.o, w.o_bias, 0, rows_);

    k_.rms_norm(x, hidden, w.post_norm.data(), c_.rms_norm_eps, normed, hidden, rows_, hidden, pool());
    // Ranks of a TP group have the same rows, hence the same tiles and the same number of exchanges.
    for (int64_t row0 = 0; row0 < rows_; row0 += kMlpRows) {
      const int64_t rows = std::min(kMlpRows, rows_ - row0);
      float* gate_up = gate_up_.as<float>();
      k_.linear({.x = normed + row0 * hidden,
                 .x_stride = hidden,
                 .m = rows,
                 .w = &w.gate_up,
                 .bias = w.gate_up_bias.empty() ? nullptr : w.gate_up_bias.data(),
                 .y = gate_up,
                 .y_stride = 2 * w_.ffn},
                pool());
      k_.swiglu(gate_up, 2 * w_.ffn, gate_up + w_.ffn, 2 * w_.ffn, act_.as<float>(), w_.ffn, rows, w_.ffn, pool());
      RowParallel(act_.as<float>(), w_.ffn, w.down, w.down_bias, row0, rows);
    }
  }
}

void Transformer::Embed(const ForwardBatch& batch) {
  const int64_t hidden = c_.hidden_size;
  const bool split = o_.groups.tp->size() > 1;
  if (split) ReserveFloats(partial_[parity_], rows_ * hidden);
  float* out = split ? Partial() : x_.as<float>();
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
  if (!split || rows_ == 0) return;  // TP peers have the same rows: all of them go on, or none
  std::memset(x_.data(), 0, static_cast<size_t>(rows_ * hidden) * sizeof(float));
  AddReduced(0, rows_);
}

void Transformer::RowParallel(const float* y, int64_t y_stride, const PackedWeights& w, const std::vector<float>& bias,
                              int64_t row0, int64_t rows) {
  const int64_t hidden = c_.hidden_size;
  LinearArgs args{.x = y,
                  .x_stride = y_stride,
                  .m = rows,
                  .w = &w,
                  .bias = bias.empty() ? nullptr : bias.data(),
                  .y = x_.as<float>() + row0 * hidden,
                  .y_stride = hidden,
                  .accumulate = true};
  if (o_.groups.tp->size() == 1) {
    k_.linear(args, pool());
    return;
  }
  ReserveFloats(partial_[parity_], rows * hidden);
  args.y = Partial();
  args.accumulate = false;
  k_.linear(args, pool());
  AddReduced(row0, rows);
}

void Transformer::AddReduced(int64_t row0, int64_t rows) {
  Communicator& tp = *o_.groups.tp;
  const int64_t hidden = c_.hidden_size;
  float* x = x_.as<float>() + row0 * hidden;
  std::vector<std::span<const float>> parts;
  tp.AllGather(std::span<const float>(Partial(), static_cast<size_t>(rows * hidden)), parts);
  std::vector<const float*> sources(parts.size());

  // Always in the order of the ranks, so that all of them get the same sum to the last bit.
  const bool direct = rows <= kDirectReduceRows;
  const Range mine = direct ? Range{0, rows} : SplitRange(rows, tp.size(), tp.rank());
  for (size_t i = 0; i < parts.size(); ++i) sources[i] = parts[i].data() + mine.begin * hidden;
  Buffer& reduced = reduced_[parity_];
  ReserveFloats(reduced, mine.size() * hidden);
  k_.sum_parts(sources, mine.size() * hidden, reduced.as<float>(), pool());
  if (direct) {
    k_.add(x, hidden, reduced.as<float>(), hidden, rows, hidden, pool());
  } else {
    std::vector<std::span<const float>> sums;
    tp.AllGather(std::span<const float>(reduced.as<float>(), static_cast<size_t>(mine.size() * hidden)), sums);
    for (int i = 0; i < tp.size(); ++i) {
      const Range share = SplitRange(rows, tp.size(), i);
      k_.add(x + share.begin * hidden, hidden, sums[static_cast<size_t>(i)].data(), hidden, share.size(), hidden,
             pool());
    }
  }
  Toggle();
}

void Transformer::PrepareAttention(const ForwardBatch& batch) {
  gather_kv_tasks_.clear();
  gather_q_tasks_.clear();
  // All pages first: the tasks hold views of them.
  gather_kv_pages_.clear();
  gather_q_pages_.clear();
  const KvCacheShape& shape = o_.cache->shape();
  auto pages_of = [&](const QuerySegment& segment, const int32_t* visible) {
    return KvPages{.dtype = shape.dtype,
                   .block_table = segment.block_table.data(),
                   .block_tokens = shape.block_tokens,
                   .k_block_stride = shape.k_block_elements(),
                   .k_head_stride = shape.block_tokens * shape.k_dim,
                   .v_block_stride = shape.v_block_elements(),
                   .v_head_stride = shape.block_tokens * shape.v_dim,
                   .visible = visible};
  };
  for (const QuerySegment& segment : batch.gather_kv) {
    for (int32_t shard = 0; shard < shards_; ++shard) {
      gather_kv_pages_.push_back(
          pages_of(segment, batch.gather_kv_visible.data() + shard * batch.gather_kv_rows + segment.row0));
    }
  }
  const size_t local = batch.local_shards.size();
  for (const QuerySegment& segment : batch.gather_q) {
    for (size_t i = 0; i < local; ++i) {
      gather_q_pages_.push_back(pages_of(
          segment, batch.gather_q_visible.data() + static_cast<int64_t>(i) * batch.gathered_rows + segment.row0));
    }
  }

  const auto shards = static_cast<size_t>(shards_);
  for (size_t i = 0; i < batch.gather_kv.size(); ++i) {
    const QuerySegment& segment = batch.gather_kv[i];
    gather_kv_tasks_.push_back({.q = qkv_.as<float>() + segment.row0 * qkv_dim_,
                                .q_stride = qkv_dim_,
                                .out = attn_.as<float>() + segment.row0 * q_dim_,
                                .out_stride = q_dim_,
                                .rows = segment.rows,
                                .kv = std::span<const KvPages>(gather_kv_pages_).subspan(i * shards, shards)});
  }
  if (!batch.any_gather_q) return;
  const int64_t group_dim = dcp_ * q_dim_;
  const int64_t group_heads = dcp_ * heads_;
  ReserveFloats(gathered_q_, batch.gathered_rows * group_dim);
  for (Buffer& part : gather_q_part_) ReserveFloats(part, batch.gathered_rows * (group_dim + group_heads));
  for (size_t i = 0; i < batch.gather_q.size(); ++i) {
    const QuerySegment& segment = batch.gather_q[i];
    gather_q_tasks_.push_back({.q = gathered_q_.as<float>() + segment.row0 * group_dim,
                               .q_stride = group_dim,
                               .out_stride = group_dim,
                               .lse_stride = group_heads,
                               .rows = segment.rows,
                               .kv = std::span<const KvPages>(gather_q_pages_).subspan(i * local, local)});
  }
}

void Transformer::Attention(const ForwardBatch& batch, int64_t layer) {
  const LayerWeights& w = w_.layers[static_cast<size_t>(layer)];
  float* q = qkv_.as<float>();
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
           .cos_sin = o_.rope->data()},
          pool());
  StoreKv(batch, layer);
  GatherKvAttention(layer);
  if (batch.any_gather_q) GatherQAttention(batch, layer);
}

void Transformer::StoreKv(const ForwardBatch& batch, int64_t layer) {
  const KvCacheShape& shape = o_.cache->shape();
  Communicator& pcp = *o_.groups.pcp;
  const float* qkv = qkv_.as<float>();
  const std::span<const float> own(qkv, static_cast<size_t>(rows_ * qkv_dim_));
  std::vector<std::span<const float>> sources = {own};
  if (!solo_ && pcp.size() > 1) pcp.AllGather(own, sources);
  for (const ForwardBatch::Store& store : batch.stores) {
    if (store.slots.empty()) continue;
    const float* from = sources[static_cast<size_t>(store.source)].data();
    const KvCache& cache = *pcp_caches_[static_cast<size_t>(store.target)];
    k_.kv_write({.k = from + q_dim_,
                 .k_stride = qkv_dim_,
                 .v = from + q_dim_ + kv_dim_,
                 .v_stride = qkv_dim_,
                 .slots = store.slots.data(),
                 .rows = static_cast<int64_t>(store.slots.size()),
                 .kv_heads = static_cast<int>(kv_heads_),
                 .k_dim = static_cast<int>(c_.head_dim),
                 .v_dim = static_cast<int>(c_.head_dim),
                 .block_tokens = shape.block_tokens,
                 .k_cache = cache.k(layer),
                 .v_cache = cache.v(layer),
                 .dtype = shape.dtype},
                pool());
  }
  // Rows that gather KV read all shards: their new keys must be there.
  if (batch.any_gather_kv && exchange().size() > 1) exchange().Barrier();
  // The next layer overwrites qkv: the PCP peers must have read it. Where they are among the KV shards, the barrier
  // above, or the exchange of the gather-Q rows, has seen to it.
  if (!solo_ && pcp.size() > 1 && o_.parallel.pcp_kv_layout == cp::PcpKvLayout::kReplicated) pcp.Release();
}

AttentionArgs Transformer::AttentionOver(std::span<const AttentionTask> tasks, int64_t q_heads) const {
  return {.tasks = tasks,
          .q_heads = static_cast<int>(q_heads),
          .kv_heads = static_cast<int>(kv_heads_),
          .k_dim = static_cast<int>(c_.head_dim),
          .v_dim = static_cast<int>(c_.head_dim),
          .scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(c_.head_dim)))};
}

void Transformer::GatherKvAttention(int64_t layer) {
  if (gather_kv_tasks_.empty()) return;
  for (size_t i = 0; i < gather_kv_pages_.size(); ++i) {
    const KvCache& cache = *shard_caches_[i % static_cast<size_t>(shards_)];
    gather_kv_pages_[i].k = cache.k(layer);
    gather_kv_pages_[i].v = cache.v(layer);
  }
  k_.attention(AttentionOver(gather_kv_tasks_, heads_), pool());
}

// Each rank attends with the gathered queries, all heads of its DCP group, to its own shard; the partial results are
// exchanged over all shards, and each rank merges those of its own rows and heads.
void Transformer::GatherQAttention(const ForwardBatch& batch, int64_t layer) {
  Communicator& cp = exchange();
  const int64_t own_rows = rows_ - batch.gather_kv_rows;
  const float* own_q = qkv_.as<float>() + batch.gather_kv_rows * qkv_dim_;
  const int64_t group_dim = dcp_ * q_dim_;
  const int64_t group_heads = dcp_ * heads_;
  float* q = gathered_q_.as<float>();

  std::vector<std::span<const float>> queries;
  cp.AllGather(std::span<const float>(own_q, static_cast<size_t>(own_rows * qkv_dim_)), queries);
  int64_t first = 0;      // of a PCP rank's rows among the gathered ones
  int64_t own_first = 0;  // of this rank's
  for (size_t pcp = 0; pcp < batch.gather_q_rows.size(); ++pcp) {
    const int64_t rows = batch.gather_q_rows[pcp];
    for (int64_t dcp = 0; dcp < dcp_; ++dcp) {
      const int64_t member = static_cast<int64_t>(pcp) * dcp_ + dcp;
      if (member == cp.rank()) own_first = first;
      const float* from = queries[static_cast<size_t>(member)].data();
      for (int64_t row = 0; row < rows; ++row) {
        std::memcpy(q + (first + row) * group_dim + dcp * q_dim_, from + row * qkv_dim_,
                    static_cast<size_t>(q_dim_) * sizeof(float));
      }
    }
    first += rows;
  }

  // [gathered rows, group heads, head_dim], then [gathered rows, group heads].
  float* out = gather_q_part_[gather_q_parity_].as<float>();
  float* lse = out + batch.gathered_rows * group_dim;
  const size_t local = batch.local_shards.size();
  for (size_t i = 0; i < gather_q_pages_.size(); ++i) {
    const KvCache& cache = *shard_caches_[static_cast<size_t>(batch.local_shards[i % local])];
    gather_q_pages_[i].k = cache.k(layer);
    gather_q_pages_[i].v = cache.v(layer);
  }
  for (size_t i = 0; i < gather_q_tasks_.size(); ++i) {
    const int64_t row = batch.gather_q[i].row0;
    gather_q_tasks_[i].out = out + row * group_dim;
    gather_q_tasks_[i].lse = lse + row * group_heads;
  }
  k_.attention(AttentionOver(gather_q_tasks_, group_heads), pool());

  std::vector<std::span<const float>> parts;
  cp.AllGather(std::span<const float>(out, static_cast<size_t>(batch.gathered_rows * (group_dim + group_heads))),
               parts);
  std::vector<const float*> outs, lses;
  for (const auto& part : parts) {
    outs.push_back(part.data() + own_first * group_dim + o_.coord.dcp * q_dim_);
    lses.push_back(part.data() + batch.gathered_rows * group_dim + own_first * group_heads + o_.coord.dcp * heads_);
  }
  k_.merge({.out = outs,
            .lse = lses,
            .rows = own_rows,
            .heads = heads_,
            .dim = c_.head_dim,
            .out_row_stride = group_dim,
            .lse_row_stride = group_heads,
            .merged = attn_.as<float>() + batch.gather_kv_rows * q_dim_,
            .merged_row_stride = q_dim_},
           pool());
  gather_q_parity_ ^= 1;
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
  std::vector<std::span<const float>> parts;
  tp.AllGather(std::span<const float>(args.y, static_cast<size_t>(n * part)), parts);
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
