#include "weft/model/weights.h"

#include <algorithm>
#include <mutex>
#include <string>

#include "weft/core/error.h"

namespace weft {
namespace {

// Rows of a matrix read and packed at a time: a bound on the memory that loading needs besides the weights.
constexpr int64_t kTileRows = 16 * PackedWeights::kPanel;

// Rows [row0, row0 + rows) x columns [col0, col0 + cols) of a tensor.
struct Slice {
  std::string name;
  int64_t row0 = 0;
  int64_t rows = 0;
  int64_t col0 = 0;
  int64_t cols = 0;
};

class Loader {
 public:
  Loader(const Checkpoint& checkpoint, DType dtype, const KernelTable& kernels, ThreadPool& pool,
         const std::function<void(int64_t)>& on_bytes)
      : checkpoint_(checkpoint), dtype_(dtype), kernels_(kernels), pool_(pool), on_bytes_(on_bytes) {}

  std::vector<float> Vector(const std::string& name, int64_t first, int64_t n, int64_t whole) {
    CheckShape(name, {whole});
    std::vector<float> values(static_cast<size_t>(n));
    checkpoint_.Read(name, 0, 1, first, n, DType::kF32, values.data());
    on_bytes_(n * 4);
    return values;
  }

  // The slices one below the other as one packed matrix. `whole` are the shapes the tensors must have.
  void Matrix(const std::vector<Slice>& slices, const std::vector<std::vector<int64_t>>& whole, PackedWeights& w) {
    int64_t n = 0;
    for (size_t i = 0; i < slices.size(); ++i) {
      CheckShape(slices[i].name, whole[i]);
      n += slices[i].rows;
    }
    w.dtype = dtype_;
    w.n = n;
    w.k = slices[0].cols;
    kernels_.pack_weights(nullptr, dtype_, 0, 0, 0, w);  // allocates
    const int64_t tiles = (n + kTileRows - 1) / kTileRows;
    // A kernel pool's function must not throw: the first error is carried out by hand.
    std::mutex mutex;
    std::exception_ptr error;
    pool_.ParallelFor(tiles, 1, [&](int64_t begin, int64_t end, int) {
      try {
        for (int64_t tile = begin; tile < end; ++tile) LoadTile(slices, tile * kTileRows, w);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!error) error = std::current_exception();
      }
    });
    if (error) std::rethrow_exception(error);
  }

 private:
  void CheckShape(const std::string& name, const std::vector<int64_t>& want) const {
    const std::vector<int64_t> got = checkpoint_.Shape(name);
    if (got == want) return;
    Throw("tensor {} has shape [{}], but the model's config asks for [{}]", name, fmt::join(got, ", "),
          fmt::join(want, ", "));
  }

  void LoadTile(const std::vector<Slice>& slices, int64_t row0, PackedWeights& w) {
    thread_local std::vector<std::byte> staging;
    const int64_t rows = std::min(kTileRows, w.n - row0);
    const size_t row_bytes = static_cast<size_t>(w.k) * SizeOf(dtype_);
    staging.resize(static_cast<size_t>(rows) * row_bytes);
    int64_t slice_begin = 0;
    for (const Slice& slice : slices) {
      const int64_t begin = std::max(row0, slice_begin);
      const int64_t end = std::min(row0 + rows, slice_begin + slice.rows);
      if (begin < end) {
        checkpoint_.Read(slice.name, slice.row0 + begin - slice_begin, end - begin, slice.col0, slice.cols, dtype_,
                         staging.data() + static_cast<size_t>(begin - row0) * row_bytes);
      }
      slice_begin += slice.rows;
    }
    kernels_.pack_weights(staging.data(), dtype_, w.k, row0, rows, w);
    on_bytes_(rows * static_cast<int64_t>(row_bytes));
  }

  const Checkpoint& checkpoint_;
  DType dtype_;
  const KernelTable& kernels_;
  ThreadPool& pool_;
  const std::function<void(int64_t)>& on_bytes_;
};

}  // namespace

int64_t ModelWeights::bytes() const {
  size_t total = lm_head.data.bytes() + embedding.data.bytes() + final_norm.size() * 4;
  for (const LayerWeights& layer : layers) {
    total += layer.qkv.data.bytes() + layer.o.data.bytes() + layer.gate_up.data.bytes() + layer.down.data.bytes();
  }
  return static_cast<int64_t>(total);
}

std::shared_ptr<const ModelWeights> LoadWeights(const Checkpoint& checkpoint, int tp_size, int tp, DType dtype,
                                                const KernelTable& kernels, ThreadPool& pool,
                                                const std::function<void(int64_t)>& on_bytes) {
  const ModelConfig& c = checkpoint.config();
  auto weights = std::make_shared<ModelWeights>();
  Loader load(checkpoint, dtype, kernels, pool, on_bytes);

  const Range heads = SplitRange(c.num_heads, tp_size, tp);
  // With more ranks than KV heads, neighbouring ranks hold the same one (and DCP groups lie among them).
  const Range kv_heads = tp_size <= c.num_kv_heads
                             ? SplitRange(c.num_kv_heads, tp_size, tp)
                             : Range{tp / (tp_size / c.num_kv_heads), tp / (tp_size / c.num_kv_heads) + 1};
  const Range ffn = SplitRange(c.intermediate_size, tp_size, tp);
  weights->dtype = dtype;
  weights->heads = heads.size();
  weights->kv_heads = kv_heads.size();
  weights->ffn = ffn.size();
  weights->vocab = SplitRange(c.vocab_size, tp_size, tp);

  const int64_t hidden = c.hidden_size;
  const int64_t hd = c.head_dim;
  const int64_t q_rows = c.num_heads * hd;
  const int64_t kv_rows = c.num_kv_heads * hd;

  auto vocab_rows = [&](const std::string& name, PackedWeights& w) {
    load.Matrix({{name, weights->vocab.begin, weights->vocab.size(), 0, hidden}}, {{c.vocab_size, hidden}}, w);
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
  weights->final_norm = load.Vector("model.norm.weight", 0, hidden, hidden);

  weights->layers.resize(static_cast<size_t>(c.num_layers));
  for (int64_t i = 0; i < c.num_layers; ++i) {
    LayerWeights& layer = weights->layers[static_cast<size_t>(i)];
    const std::string base = fmt::format("model.layers.{}.", i);
    const std::string attn = base + "self_attn.";
    const std::string mlp = base + "mlp.";

    layer.input_norm = load.Vector(base + "input_layernorm.weight", 0, hidden, hidden);
    layer.post_norm = load.Vector(base + "post_attention_layernorm.weight", 0, hidden, hidden);
    load.Matrix({{attn + "q_proj.weight", heads.begin * hd, heads.size() * hd, 0, hidden},
                 {attn + "k_proj.weight", kv_heads.begin * hd, kv_heads.size() * hd, 0, hidden},
                 {attn + "v_proj.weight", kv_heads.begin * hd, kv_heads.size() * hd, 0, hidden}},
                {{q_rows, hidden}, {kv_rows, hidden}, {kv_rows, hidden}}, layer.qkv);
    if (c.qkv_bias) {
      layer.qkv_bias = load.Vector(attn + "q_proj.bias", heads.begin * hd, heads.size() * hd, q_rows);
      for (const char* name : {"k_proj.bias", "v_proj.bias"}) {
        const auto part = load.Vector(attn + name, kv_heads.begin * hd, kv_heads.size() * hd, kv_rows);
        layer.qkv_bias.insert(layer.qkv_bias.end(), part.begin(), part.end());
      }
    }
    if (c.qk_norm) {
      layer.q_norm = load.Vector(attn + "q_norm.weight", 0, hd, hd);
      layer.k_norm = load.Vector(attn + "k_norm.weight", 0, hd, hd);
    }
    load.Matrix({{attn + "o_proj.weight", 0, hidden, heads.begin * hd, heads.size() * hd}}, {{hidden, q_rows}},
                layer.o);
    if (c.o_bias && tp == 0) layer.o_bias = load.Vector(attn + "o_proj.bias", 0, hidden, hidden);

    load.Matrix({{mlp + "gate_proj.weight", ffn.begin, ffn.size(), 0, hidden},
                 {mlp + "up_proj.weight", ffn.begin, ffn.size(), 0, hidden}},
                {{c.intermediate_size, hidden}, {c.intermediate_size, hidden}}, layer.gate_up);
    load.Matrix({{mlp + "down_proj.weight", 0, hidden, ffn.begin, ffn.size()}}, {{hidden, c.intermediate_size}},
                layer.down);
    if (c.mlp_bias) {
      layer.gate_up_bias = load.Vector(mlp + "gate_proj.bias", ffn.begin, ffn.size(), c.intermediate_size);
      const auto up = load.Vector(mlp + "up_proj.bias", ffn.begin, ffn.size(), c.intermediate_size);
      layer.gate_up_bias.insert(layer.gate_up_bias.end(), up.begin(), up.end());
      if (tp == 0) layer.down_bias = load.Vector(mlp + "down_proj.bias", 0, hidden, hidden);
    }
  }
  return weights;
}

}  // namespace weft
