#include "weft/model/weights.h"

#include <algorithm>
#include <mutex>
#include <string>

#include "weft/core/error.h"

namespace weft {
namespace {

// Rows of a matrix read and packed at a time: a bound on the memory that loading needs besides the weights.
constexpr int64_t kTileRows = 16 * PackedWeights::kPanel;

using Shape = std::vector<int64_t>;

// Rows [row0, row0 + rows) x columns [col0, col0 + cols) of a tensor that must have the shape `whole`.
struct Slice {
  std::string name;
  Shape whole;
  int64_t row0 = 0;
  int64_t rows = 0;
  int64_t col0 = 0;
  int64_t cols = 0;
};

Slice Rows(std::string name, int64_t all_rows, int64_t cols, Range rows) {
  return {std::move(name), {all_rows, cols}, rows.begin, rows.size(), 0, cols};
}
Slice Columns(std::string name, int64_t rows, int64_t all_cols, Range cols) {
  return {std::move(name), {rows, all_cols}, 0, rows, cols.begin, cols.size()};
}

// Queues matrices and loads all queued ones as one parallel job, so that small ones (heads, experts) fill the threads.
class Loader {
 public:
  Loader(const Checkpoint& checkpoint, DType dtype, const KernelTable& kernels, ThreadPool& pool,
         const std::function<void(int64_t)>& on_bytes)
      : checkpoint_(checkpoint), dtype_(dtype), kernels_(kernels), pool_(pool), on_bytes_(on_bytes) {}

  std::vector<float> Vector(const std::string& name, int64_t first, int64_t n, const Shape& whole) {
    CheckShape(name, whole);
    std::vector<float> values(static_cast<size_t>(n));
    checkpoint_.Read(name, 0, 1, first, n, DType::kF32, values.data());
    on_bytes_(n * 4);
    return values;
  }
  std::vector<float> Vector(const std::string& name, int64_t n) { return Vector(name, 0, n, {n}); }

  // The slices one below the other as one packed matrix, which must stay where it is until Run.
  void Add(std::vector<Slice> slices, PackedWeights& w, DType dtype) {
    int64_t n = 0;
    for (const Slice& slice : slices) {
      CheckShape(slice.name, slice.whole);
      n += slice.rows;
    }
    w.dtype = dtype;
    w.n = n;
    w.k = slices[0].cols;
    Queue({std::move(slices), &w, false});
  }
  void Add(std::vector<Slice> slices, PackedWeights& w) { Add(std::move(slices), w, dtype_); }
  // The slice's transpose.
  void AddTransposed(Slice slice, PackedWeights& w) {
    CheckShape(slice.name, slice.whole);
    w.dtype = dtype_;
    w.n = slice.cols;
    w.k = slice.rows;
    Queue({{std::move(slice)}, &w, true});
  }

  void Run() {
    for (const Job& job : jobs_) kernels_.pack_weights(nullptr, job.w->dtype, 0, 0, 0, *job.w);  // allocates
    // A kernel pool's function must not throw: the first error is carried out by hand.
    std::mutex mutex;
    std::exception_ptr error;
    pool_.ParallelFor(static_cast<int64_t>(tiles_.size()), 1, [&](int64_t begin, int64_t end, int) {
      try {
        for (int64_t i = begin; i < end; ++i) {
          const Tile& tile = tiles_[static_cast<size_t>(i)];
          LoadTile(jobs_[tile.job], tile.row0);
        }
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!error) error = std::current_exception();
      }
    });
    jobs_.clear();
    tiles_.clear();
    if (error) std::rethrow_exception(error);
  }

 private:
  struct Job {
    std::vector<Slice> slices;
    PackedWeights* w;
    bool transposed;
  };
  struct Tile {
    size_t job;
    int64_t row0;
  };

  void Queue(Job job) {
    if (job.w->n == 0 || job.w->k == 0) return;
    for (int64_t row0 = 0; row0 < job.w->n; row0 += kTileRows) tiles_.push_back({jobs_.size(), row0});
    jobs_.push_back(std::move(job));
  }

  void CheckShape(const std::string& name, const Shape& want) const {
    const Shape got = checkpoint_.Shape(name);
    if (got == want) return;
    Throw("tensor {} has shape [{}], but the model's config asks for [{}]", name, fmt::join(got, ", "),
          fmt::join(want, ", "));
  }

  void LoadTile(const Job& job, int64_t row0) {
    thread_local std::vector<std::byte> staging;
    PackedWeights& w = *job.w;
    const int64_t rows = std::min(kTileRows, w.n - row0);
    const size_t row_bytes = static_cast<size_t>(w.k) * SizeOf(w.dtype);
    staging.resize(static_cast<size_t>(rows) * row_bytes);
    if (job.transposed) {
      w.dtype == DType::kF32 ? ReadTransposed<float>(job.slices[0], row0, rows, w.dtype, staging.data())
                             : ReadTransposed<uint16_t>(job.slices[0], row0, rows, w.dtype, staging.data());
    } else {
      int64_t slice_begin = 0;
      for (const Slice& slice : job.slices) {
        const int64_t begin = std::max(row0, slice_begin);
        const int64_t end = std::min(row0 + rows, slice_begin + slice.rows);
        if (begin < end) {
          checkpoint_.Read(slice.name, slice.row0 + begin - slice_begin, end - begin, slice.col0, slice.cols, w.dtype,
                           staging.data() + static_cast<size_t>(begin - row0) * row_bytes);
        }
        slice_begin += slice.rows;
      }
    }
    kernels_.pack_weights(staging.data(), w.dtype, w.k, row0, rows, w);
    on_bytes_(rows * static_cast<int64_t>(row_bytes));
  }

  // Rows [row0, row0 + rows) of the slice's transpose, whose elements have the size of T.
  template <typename T>
  void ReadTransposed(const Slice& slice, int64_t row0, int64_t rows, DType dtype, std::byte* dst) const {
    thread_local std::vector<T> source;
    source.resize(static_cast<size_t>(rows * slice.rows));
    checkpoint_.Read(slice.name, slice.row0, slice.rows, slice.col0 + row0, rows, dtype, source.data());
    T* out = reinterpret_cast<T*>(dst);  // a vector's storage: aligned for any value
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < slice.rows; ++j) *out++ = source[static_cast<size_t>(j * rows + i)];
    }
  }

  const Checkpoint& checkpoint_;
  DType dtype_;
  const KernelTable& kernels_;
  ThreadPool& pool_;
  const std::function<void(int64_t)>& on_bytes_;
  std::vector<Job> jobs_;
  std::vector<Tile> tiles_;
};

void Append(std::vector<float>& to, const std::vector<float>& from) { to.insert(to.end(), from.begin(), from.end()); }

// One TP rank's part of every layer.
class LayerLoader {
 public:
  LayerLoader(const ModelConfig& config, int tp_size, int tp, Loader& load)
      : c_(config),
        load_(load),
        tp_(tp),
        heads(SplitRange(c_.num_heads, tp_size, tp)),
        // With more ranks than KV heads, neighbouring ranks hold the same one (and DCP groups lie among them).
        kv_heads(tp_size <= c_.num_kv_heads
                     ? SplitRange(c_.num_kv_heads, tp_size, tp)
                     : Range{tp / (tp_size / c_.num_kv_heads), tp / (tp_size / c_.num_kv_heads) + 1}),
        ffn(SplitRange(c_.intermediate_size, tp_size, tp)),
        shared_ffn(SplitRange(c_.moe ? c_.moe->shared_ffn : 0, tp_size, tp)) {}

  void Load(int64_t index, LayerWeights& layer) {
    const std::string base = fmt::format("model.layers.{}.", index);
    const int64_t hidden = c_.hidden_size;
    layer.input_norm = load_.Vector(base + "input_layernorm.weight", hidden);
    layer.post_norm = load_.Vector(base + "post_attention_layernorm.weight", hidden);
    if (c_.mla) {
      LatentAttention(base + "self_attn.", layer);
    } else {
      Attention(base + "self_attn.", layer);
    }
    const int64_t o_cols = c_.num_heads * c_.v_dim();
    load_.Add(
        {Columns(base + "self_attn.o_proj.weight", hidden, o_cols, {heads.begin * c_.v_dim(), heads.end * c_.v_dim()})},
        layer.o);
    if (c_.o_bias && tp_ == 0) layer.o_bias = load_.Vector(base + "self_attn.o_proj.bias", hidden);
    if (c_.IsMoe(index)) {
      Moe(base + "mlp.", layer);
    } else {
      Mlp(base + "mlp.", c_.intermediate_size, ffn, c_.mlp_bias, layer);
    }
    load_.Run();
  }

 private:
  const ModelConfig& c_;
  Loader& load_;
  const int tp_;

 public:
  const Range heads, kv_heads, ffn, shared_ffn;

 private:
  void Attention(const std::string& attn, LayerWeights& layer) {
    const int64_t hd = c_.head_dim;
    const int64_t q_rows = c_.num_heads * hd;
    const int64_t kv_rows = c_.num_kv_heads * hd;
    const Range q{heads.begin * hd, heads.end * hd};
    const Range kv{kv_heads.begin * hd, kv_heads.end * hd};
    load_.Add({Rows(attn + "q_proj.weight", q_rows, c_.hidden_size, q),
               Rows(attn + "k_proj.weight", kv_rows, c_.hidden_size, kv),
               Rows(attn + "v_proj.weight", kv_rows, c_.hidden_size, kv)},
              layer.qkv);
    if (c_.qkv_bias) {
      layer.qkv_bias = load_.Vector(attn + "q_proj.bias", q.begin, q.size(), {q_rows});
      for (const char* name : {"k_proj.bias", "v_proj.bias"}) {
        Append(layer.qkv_bias, load_.Vector(attn + name, kv.begin, kv.size(), {kv_rows}));
      }
    }
    if (c_.qk_norm) {
      layer.q_norm = load_.Vector(attn + "q_norm.weight", hd);
      layer.k_norm = load_.Vector(attn + "k_norm.weight", hd);
    }
  }

  void LatentAttention(const std::string& attn, LayerWeights& layer) {
    const MlaConfig& mla = *c_.mla;
    const int64_t hidden = c_.hidden_size;
    const int64_t latent = mla.kv_lora_rank;
    const int64_t latent_rows = latent + mla.qk_rope_head_dim;
    const int64_t q_rows = c_.num_heads * c_.head_dim;
    const Range q{heads.begin * c_.head_dim, heads.end * c_.head_dim};
    const Slice kv_a = Rows(attn + "kv_a_proj_with_mqa.weight", latent_rows, hidden, {0, latent_rows});
    if (mla.q_lora_rank > 0) {
      load_.Add({Rows(attn + "q_a_proj.weight", mla.q_lora_rank, hidden, {0, mla.q_lora_rank}), kv_a}, layer.qkv);
      load_.Add({Rows(attn + "q_b_proj.weight", q_rows, mla.q_lora_rank, q)}, layer.q_b);
      layer.q_a_norm = load_.Vector(attn + "q_a_layernorm.weight", mla.q_lora_rank);
    } else {
      load_.Add({Rows(attn + "q_proj.weight", q_rows, hidden, q), kv_a}, layer.qkv);
    }
    layer.kv_a_norm = load_.Vector(attn + "kv_a_layernorm.weight", latent);
    if (c_.qkv_bias) {  // on the projections from the hidden state, but never on q_proj
      if (mla.q_lora_rank > 0) {
        layer.qkv_bias = load_.Vector(attn + "q_a_proj.bias", mla.q_lora_rank);
      } else {
        layer.qkv_bias.assign(static_cast<size_t>(q.size()), 0.0f);
      }
      Append(layer.qkv_bias, load_.Vector(attn + "kv_a_proj_with_mqa.bias", latent_rows));
    }
    // kv_b_proj: of each head its k_nope rows, then its v rows.
    const std::string kv_b = attn + "kv_b_proj.weight";
    const int64_t head_rows = mla.qk_nope_head_dim + mla.v_head_dim;
    const auto count = static_cast<size_t>(heads.size());
    layer.k_up.resize(count);
    layer.v_up.resize(count);
    layer.k_absorb.resize(count);
    for (size_t i = 0; i < count; ++i) {
      const int64_t row = (heads.begin + static_cast<int64_t>(i)) * head_rows;
      const Slice k = Rows(kv_b, c_.num_heads * head_rows, latent, {row, row + mla.qk_nope_head_dim});
      load_.Add({k}, layer.k_up[i]);
      load_.AddTransposed(k, layer.k_absorb[i]);
      load_.Add({Rows(kv_b, c_.num_heads * head_rows, latent, {row + mla.qk_nope_head_dim, row + head_rows})},
                layer.v_up[i]);
    }
  }

  // A gated MLP of `width`, of which `part` is this rank's.
  void Mlp(const std::string& mlp, int64_t width, Range part, bool bias, LayerWeights& layer) {
    const int64_t hidden = c_.hidden_size;
    load_.Add({Rows(mlp + "gate_proj.weight", width, hidden, part), Rows(mlp + "up_proj.weight", width, hidden, part)},
              layer.gate_up);
    load_.Add({Columns(mlp + "down_proj.weight", hidden, width, part)}, layer.down);
    if (!bias) return;
    layer.gate_up_bias = load_.Vector(mlp + "gate_proj.bias", part.begin, part.size(), {width});
    Append(layer.gate_up_bias, load_.Vector(mlp + "up_proj.bias", part.begin, part.size(), {width}));
    if (tp_ == 0) layer.down_bias = load_.Vector(mlp + "down_proj.bias", hidden);
  }

  // Everything of an MoE layer but the routed experts.
  void Moe(const std::string& mlp, LayerWeights& layer) {
    const MoeConfig& moe = *c_.moe;
    const Slice router = Rows(mlp + "gate.weight", moe.num_experts, c_.hidden_size, {0, moe.num_experts});
    if (moe.router_f32) {
      load_.Add({router}, layer.router, DType::kF32);
    } else {
      load_.Add({router}, layer.router);
    }
    if (moe.correction_bias) {
      layer.correction_bias = load_.Vector(mlp + "gate.e_score_correction_bias", moe.num_experts);
    }
    if (moe.shared_ffn == 0) return;
    Mlp(mlp + (moe.shared_gate ? "shared_expert." : "shared_experts."), moe.shared_ffn, shared_ffn, false, layer);
    if (moe.shared_gate) {
      layer.shared_gate = load_.Vector(mlp + "shared_expert_gate.weight", 0, c_.hidden_size, {1, c_.hidden_size});
    }
  }
};

size_t BytesOf(const std::vector<PackedWeights>& matrices) {
  size_t total = 0;
  for (const PackedWeights& matrix : matrices) total += matrix.data.bytes();
  return total;
}

}  // namespace

int64_t ModelWeights::bytes() const {
  size_t total = lm_head.data.bytes() + embedding.data.bytes() + final_norm.size() * 4;
  for (const LayerWeights& layer : layers) {
    total += layer.qkv.data.bytes() + layer.o.data.bytes() + layer.gate_up.data.bytes() + layer.down.data.bytes() +
             layer.q_b.data.bytes() + layer.router.data.bytes() + BytesOf(layer.k_up) + BytesOf(layer.v_up) +
             BytesOf(layer.k_absorb);
  }
  return static_cast<int64_t>(total);
}

int64_t ExpertWeights::bytes() const {
  size_t total = 0;
  for (const std::vector<ExpertMlp>& layer : layers) {
    for (const ExpertMlp& expert : layer) total += expert.gate_up.data.bytes() + expert.down.data.bytes();
  }
  return static_cast<int64_t>(total);
}

std::shared_ptr<const ModelWeights> LoadWeights(const Checkpoint& checkpoint, int tp_size, int tp, DType dtype,
                                                const KernelTable& kernels, ThreadPool& pool,
                                                const std::function<void(int64_t)>& on_bytes) {
  const ModelConfig& c = checkpoint.config();
  auto weights = std::make_shared<ModelWeights>();
  Loader load(checkpoint, dtype, kernels, pool, on_bytes);
  LayerLoader layers(c, tp_size, tp, load);
  weights->dtype = dtype;
  weights->heads = layers.heads.size();
  weights->kv_heads = layers.kv_heads.size();
  weights->ffn = layers.ffn.size();
  weights->shared_ffn = layers.shared_ffn.size();
  weights->vocab = SplitRange(c.vocab_size, tp_size, tp);

  const auto vocab_rows = [&](const std::string& name, PackedWeights& w) {
    load.Add({Rows(name, c.vocab_size, c.hidden_size, weights->vocab)}, w);
  };
  if (c.tie_word_embeddings || !checkpoint.Has("lm_head.weight")) {
    if (!c.tie_word_embeddings) {
      Throw("tensor lm_head.weight is missing and tie_word_embeddings is false");
    }
    vocab_rows("model.embed_tokens.weight", weights->lm_head);
  } else {
    vocab_rows("model.embed_tokens.weight", weights->embedding);
    vocab_rows("lm_head.weight", weights->lm_head);
  }
  load.Run();
  weights->final_norm = load.Vector("model.norm.weight", c.hidden_size);

  weights->layers.resize(static_cast<size_t>(c.num_layers));
  for (int64_t i = 0; i < c.num_layers; ++i) layers.Load(i, weights->layers[static_cast<size_t>(i)]);
  return weights;
}

std::shared_ptr<const ExpertWeights> LoadExperts(const Checkpoint& checkpoint, const ExpertSlice& slice, DType dtype,
                                                 const KernelTable& kernels, ThreadPool& pool,
                                                 const std::function<void(int64_t)>& on_bytes) {
  const ModelConfig& c = checkpoint.config();
  if (!c.moe) return nullptr;
  WEFT_CHECK(
      0 <= slice.experts.begin && slice.experts.begin <= slice.experts.end && slice.experts.end <= c.moe->num_experts,
      "experts {} to {} of {}", slice.experts.begin, slice.experts.end, c.moe->num_experts);
  const int64_t hidden = c.hidden_size;
  const int64_t width = c.moe->expert_ffn;
  const Range part = SplitRange(width, slice.tp_size, slice.tp);
  auto weights = std::make_shared<ExpertWeights>();
  weights->experts = slice.experts;
  weights->ffn = part.size();
  weights->layers.resize(static_cast<size_t>(c.num_layers));
  Loader load(checkpoint, dtype, kernels, pool, on_bytes);
  for (int64_t i = 0; i < c.num_layers; ++i) {
    if (!c.IsMoe(i)) continue;
    std::vector<ExpertMlp>& layer = weights->layers[static_cast<size_t>(i)];
    layer.resize(static_cast<size_t>(slice.experts.size()));
    for (int64_t expert = slice.experts.begin; expert < slice.experts.end; ++expert) {
      const std::string base = fmt::format("model.layers.{}.mlp.experts.{}.", i, expert);
      ExpertMlp& mlp = layer[static_cast<size_t>(expert - slice.experts.begin)];
      load.Add(
          {Rows(base + "gate_proj.weight", width, hidden, part), Rows(base + "up_proj.weight", width, hidden, part)},
          mlp.gate_up);
      load.Add({Columns(base + "down_proj.weight", hidden, width, part)}, mlp.down);
    }
    load.Run();
  }
  return weights;
}

int64_t WeightBytes(const ModelConfig& c, DType dtype) {
  int64_t bytes = 0;
  for (const ModelTensor& tensor : ModelTensors(c)) {
    const bool router = c.moe && c.moe->router_f32 && tensor.name.ends_with(".mlp.gate.weight");
    bytes += tensor.elements() * static_cast<int64_t>(tensor.rows == 0 || router ? sizeof(float) : SizeOf(dtype));
  }
  if (c.mla) {  // LayerWeights::k_absorb
    bytes += c.num_layers * c.num_heads * c.mla->qk_nope_head_dim * c.mla->kv_lora_rank *
             static_cast<int64_t>(SizeOf(dtype));
  }
  return bytes;
}

}  // namespace weft
