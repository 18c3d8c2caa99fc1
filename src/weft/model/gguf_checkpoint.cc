#include "weft/model/gguf_checkpoint.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <unordered_map>
#include <vector>

#include "weft/core/error.h"
#include "weft/model/checkpoint_files.h"
#include "weft/model/convert.h"
#include "weft/model/dequant.h"
#include "weft/model/file_io.h"

namespace weft::internal {
namespace {

using Json = nlohmann::json;

constexpr uint32_t kGgmlF32 = 0, kGgmlF16 = 1, kGgmlBF16 = 30;

// The stored type, where it is one that ConvertValues reads.
std::optional<DType> PlainType(uint32_t ggml_type) {
  if (ggml_type == kGgmlF32) return DType::kF32;
  if (ggml_type == kGgmlF16) return DType::kF16;
  if (ggml_type == kGgmlBF16) return DType::kBF16;
  return std::nullopt;
}

class GgufCheckpoint : public Checkpoint {
 public:
  GgufCheckpoint(const std::string& path, const Json& hf_overrides) {
    files_.push_back(GgufFile::Open(path));
    OpenOtherParts();
    for (const GgufFile& file : files_) {
      for (const GgufTensorInfo& tensor : file.tensors()) {
        const auto [it, added] = tensors_.emplace(tensor.name, Located{&file, &tensor});
        if (!added) Throw("tensor {} is both in {} and in {}", tensor.name, it->second.file->path(), file.path());
        total_bytes_ += static_cast<int64_t>(tensor.bytes);
      }
    }
    permuted_ = files_[0].RequireString("general.architecture") == "llama";
    LoadConfig(hf_overrides);
  }

  const ModelConfig& config() const override { return config_; }
  bool Has(std::string_view name) const override {
    return Lookup(name).tensor != nullptr || (IsKvB(name) && HeadParts(name).k.tensor != nullptr);
  }

  std::vector<int64_t> Shape(std::string_view name) const override {
    if (IsSplitKvB(name)) {
      const KvBParts parts = FindHeadParts(name);
      return {config_.num_heads * (parts.nope + parts.v_dim), parts.latent};
    }
    const View view = Find(name);
    if (view.vector) return {view.cols};
    return {view.rows, view.cols};
  }

  DType NaturalDType(std::string_view name) const override {
    const auto is_bf16 = [](const Located& at) { return at.tensor->type.type == kGgmlBF16; };
    if (IsSplitKvB(name)) {
      const KvBParts parts = FindHeadParts(name);
      return is_bf16(parts.k) && is_bf16(parts.v) ? DType::kBF16 : DType::kF32;
    }
    return is_bf16(Find(name)) ? DType::kBF16 : DType::kF32;
  }

  void Read(std::string_view name, int64_t row0, int64_t rows, int64_t col0, int64_t cols, DType dtype,
            void* dst) const override {
    const auto out = static_cast<uint8_t*>(dst);
    if (IsSplitKvB(name)) {
      ReadHeadParts(name, row0, rows, col0, cols, dtype, out);
      return;
    }
    const View at = Find(name);
    const GgufTensorInfo& tensor = *at.tensor;
    RequireReadable(at);
    CheckSlice(name, at.rows, at.cols, row0, rows, col0, cols);
    if (rows == 0 || cols == 0) return;

    if (!IsPermuted(name)) {
      ReadRows(tensor, at.first_row + row0, rows, col0, cols, dtype, out);
    } else if (at.vector) {  // a bias: its elements are in the order of the rows
      RequireWholeHeads(at, at.cols);
      for (int64_t i = 0; i < cols; ++i) {
        ReadRows(tensor, 0, 1, PermutedRow(col0 + i, config_.head_dim), 1, dtype, out + Bytes(i, dtype));
      }
    } else {
      RequireWholeHeads(at, at.rows);
      for (int64_t i = 0; i < rows; ++i) {
        ReadRows(tensor, PermutedRow(row0 + i, config_.head_dim), 1, col0, cols, dtype, out + Bytes(i * cols, dtype));
      }
      // The heads that these rows are of.
      const int64_t first = row0 / config_.head_dim * config_.head_dim;
      const int64_t end = (row0 + rows + config_.head_dim - 1) / config_.head_dim * config_.head_dim;
      const auto row_bytes = static_cast<int64_t>(tensor.bytes) / at.rows;
      ReadDone(tensor.data + first * row_bytes, (end - first) * row_bytes);
    }
  }

  int64_t total_bytes() const override { return total_bytes_; }

 private:
  struct Located {
    const GgufFile* file = nullptr;
    const GgufTensorInfo* tensor = nullptr;
  };
  // A tensor of Hugging Face's: rows of one of the file's, counted over all its dimensions but the fastest.
  struct View : Located {
    int64_t first_row = 0, rows = 0, cols = 0;
    bool vector = false;
  };
  // kv_b_proj as newer files have it: of all heads the keys' part [heads, kv_lora_rank, nope], transposed against
  // Hugging Face, and the values' part [heads, v_dim, kv_lora_rank].
  struct KvBParts {
    Located k, v;
    int64_t nope = 0, v_dim = 0, latent = 0;
  };

  static size_t Bytes(int64_t values, DType dtype) { return static_cast<size_t>(values) * SizeOf(dtype); }

  // "name-00001-of-00003.gguf" with split.count 3: the tensors are spread over the parts, the metadata in the first.
  void OpenOtherParts() {
    const auto count = files_[0].GetU64("split.count");
    if (!count || *count <= 1) return;
    const std::string first = files_[0].path();
    const std::string suffix = fmt::format("-00001-of-{:05}.gguf", *count);
    if (!first.ends_with(suffix) || files_[0].GetU64("split.no").value_or(0) != 0) {
      Throw("{}: is part {} of a model of {} files; give the first one, whose name ends in {}", first,
            files_[0].GetU64("split.no").value_or(0) + 1, *count, suffix);
    }
    const std::string base = first.substr(0, first.size() - suffix.size());
    uint64_t tensors = files_[0].tensors().size();
    for (uint64_t part = 2; part <= *count; ++part) {
      const std::string path = fmt::format("{}-{:05}-of-{:05}.gguf", base, part, *count);
      if (!std::filesystem::exists(path)) {
        throw Error(fmt::format("{}: is missing; {} says that the model has {} files", path, first, *count),
                    ErrorKind::kNotFound);
      }
      files_.push_back(GgufFile::Open(path));
      tensors += files_.back().tensors().size();
    }
    const auto want = files_[0].GetU64("split.tensors.count");
    if (want && *want != tensors) {
      Throw("{}: the {} files have {} tensors, split.tensors.count says {}", first, *count, tensors, *want);
    }
  }

  void LoadConfig(const Json& hf_overrides) {
    const GgufFile& file = files_[0];
    try {
      Json json = GgufToHfConfig(file);
      // The embedding may lie in another part of a split model.
      const View embedding = Lookup("model.embed_tokens.weight");
      if (embedding.tensor != nullptr && !embedding.vector) json["vocab_size"] = embedding.rows;
      json["tie_word_embeddings"] = !Has("lm_head.weight");
      // Files of DeepSeek-V2-Lite are known that give the rank of a matrix that they have not.
      if (json.contains("q_lora_rank") && !Has("model.layers.0.self_attn.q_a_proj.weight")) {
        json["q_lora_rank"] = nullptr;
      }
      ApplyConfigOverrides(hf_overrides, json);
      config_ = ParseModelConfig(json);
    } catch (const Error& error) {
      const std::string text = error.what();
      if (text.starts_with(file.path())) throw;
      throw Error(fmt::format("{}: {}", file.path(), text), error.kind(), error.param());
    }
    const std::string layer = "model.layers.0.";
    config_.qkv_bias = Has(layer + (config_.mla ? "self_attn.kv_a_proj_with_mqa.bias" : "self_attn.q_proj.bias"));
    config_.o_bias = Has(layer + "self_attn.o_proj.bias");
    config_.mlp_bias = Has(layer + "mlp.gate_proj.bias");
    config_.qk_norm = Has(layer + "self_attn.q_norm.weight");

    const Located divisors = LookupGguf("rope_freqs.weight");
    if (divisors.tensor == nullptr) return;
    const GgufTensorInfo& tensor = *divisors.tensor;
    if (tensor.type.type != kGgmlF32 || static_cast<int64_t>(tensor.elements) != config_.rotary_dim / 2) {
      Throw("{}: tensor rope_freqs.weight has {} values of type {}; must be {} of type F32", divisors.file->path(),
            tensor.elements, tensor.type.name, config_.rotary_dim / 2);
    }
    config_.rope.freq_divisors.resize(tensor.elements);
    std::memcpy(config_.rope.freq_divisors.data(), tensor.data, tensor.bytes);
    for (const float divisor : config_.rope.freq_divisors) {
      if (!(divisor > 0.0f) || divisor > 1e9f) {
        Throw("{}: tensor rope_freqs.weight has the value {}; must be above 0", divisors.file->path(), divisor);
      }
    }
  }

  bool IsPermuted(std::string_view name) const {
    if (!permuted_) return false;
    const std::string_view module = name.substr(0, name.rfind('.'));
    return module.ends_with("self_attn.q_proj") || module.ends_with("self_attn.k_proj");
  }

  void RequireWholeHeads(const Located& at, int64_t rows) const {
    if (rows % config_.head_dim != 0) {
      Throw("{}: tensor {} has {} rows, which are not whole heads of {}", at.file->path(), at.tensor->name, rows,
            config_.head_dim);
    }
  }

  // A slice in the file's own order of rows.
  static void ReadRows(const GgufTensorInfo& tensor, int64_t row0, int64_t rows, int64_t col0, int64_t cols,
                       DType dtype, uint8_t* dst) {
    const auto all_cols = static_cast<int64_t>(tensor.dims[0]);
    const auto block = static_cast<int64_t>(tensor.type.block_elements);
    const auto block_bytes = static_cast<int64_t>(tensor.type.block_bytes);
    const int64_t row_bytes = all_cols / block * block_bytes;
    const uint8_t* src = tensor.data + row0 * row_bytes;
    if (cols == all_cols) ReadAhead(src, rows * row_bytes);
    if (const auto plain = PlainType(tensor.type.type)) {
      if (cols == all_cols) {
        ConvertValues(*plain, src, dtype, dst, rows * cols);
      } else {
        for (int64_t row = 0; row < rows; ++row) {
          ConvertValues(*plain, src + row * row_bytes + col0 * block_bytes, dtype, dst + Bytes(row * cols, dtype),
                        cols);
        }
      }
    } else {
      for (int64_t row = 0; row < rows; ++row) {
        DequantiseRow(tensor.type, src + row * row_bytes, col0, cols, dtype, dst + Bytes(row * cols, dtype));
      }
    }
    ReadDone(src, rows * row_bytes);
  }

  // Values [col0, col0 + cols) of one row, through a few blocks of f32, from the block that holds the first one on.
  static void DequantiseRow(const GgmlTypeInfo& type, const uint8_t* row, int64_t col0, int64_t cols, DType dtype,
                            uint8_t* out) {
    constexpr int64_t kStaging = 1024;  // a multiple of every block
    float staging[kStaging];
    const auto block = static_cast<int64_t>(type.block_elements);
    for (int64_t col = col0; col < col0 + cols;) {
      const int64_t first_block = col / block;
      const int64_t end = std::min(col0 + cols, first_block * block + kStaging);
      const int64_t blocks = (end + block - 1) / block - first_block;
      Dequantise(type.type, row + first_block * static_cast<int64_t>(type.block_bytes), blocks, staging);
      ConvertValues(DType::kF32, staging + (col - first_block * block), dtype, out, end - col);
      out += Bytes(end - col, dtype);
      col = end;
    }
  }

  static void RequireReadable(const Located& at) {
    if (CanDequantise(at.tensor->type.type)) return;
    Throw("{}: tensor {} has type {}; F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K and Q6_K can be read",
          at.file->path(), at.tensor->name, at.tensor->type.name);
  }

  static bool IsKvB(std::string_view name) { return name.ends_with(".kv_b_proj.weight"); }
  bool IsSplitKvB(std::string_view name) const { return IsKvB(name) && Lookup(name).tensor == nullptr; }

  KvBParts HeadParts(std::string_view name) const {
    const auto whole = FindGgufName(name);
    if (!whole) return {};
    const std::string layer = whole->tensor.substr(0, whole->tensor.find("attn_kv_b"));
    KvBParts parts = {LookupGguf(layer + "attn_k_b.weight"), LookupGguf(layer + "attn_v_b.weight")};
    return parts.k.tensor != nullptr && parts.v.tensor != nullptr ? parts : KvBParts{};
  }
  KvBParts FindHeadParts(std::string_view name) const {
    KvBParts parts = HeadParts(name);
    if (parts.k.tensor == nullptr) NotFound(name);
    WEFT_CHECK(config_.mla, "kv_b_proj without latent attention");
    parts.nope = config_.mla->qk_nope_head_dim;
    parts.v_dim = config_.mla->v_head_dim;
    parts.latent = config_.mla->kv_lora_rank;
    const auto require = [&](const Located& part, int64_t rows, int64_t cols) {
      const GgufTensorInfo& tensor = *part.tensor;
      if (static_cast<int64_t>(tensor.dims[0]) == cols &&
          static_cast<int64_t>(tensor.elements) == config_.num_heads * rows * cols) {
        return;
      }
      Throw("{}: tensor {} has dimensions [{}], must be of {} heads of {} x {}", part.file->path(), tensor.name,
            fmt::join(tensor.dims, ", "), config_.num_heads, cols, rows);
    };
    require(parts.k, parts.latent, parts.nope);
    require(parts.v, parts.v_dim, parts.latent);
    RequireReadable(parts.k);
    RequireReadable(parts.v);
    return parts;
  }

  void ReadHeadParts(std::string_view name, int64_t row0, int64_t rows, int64_t col0, int64_t cols, DType dtype,
                     uint8_t* dst) const {
    const KvBParts parts = FindHeadParts(name);
    const int64_t head_rows = parts.nope + parts.v_dim;
    CheckSlice(name, config_.num_heads * head_rows, parts.latent, row0, rows, col0, cols);
    if (rows == 0 || cols == 0) return;
    const size_t width = SizeOf(dtype);
    std::vector<uint8_t> columns;
    for (int64_t row = row0; row < row0 + rows;) {
      const int64_t head = row / head_rows, in_head = row % head_rows;
      const bool keys = in_head < parts.nope;
      const int64_t n = std::min(row0 + rows - row, (keys ? parts.nope : head_rows) - in_head);
      if (keys) {
        columns.resize(Bytes(cols * n, dtype));
        ReadRows(*parts.k.tensor, head * parts.latent + col0, cols, in_head, n, dtype, columns.data());
        for (int64_t i = 0; i < n; ++i) {
          for (int64_t j = 0; j < cols; ++j) {
            std::memcpy(dst + Bytes(i * cols + j, dtype), columns.data() + Bytes(j * n + i, dtype), width);
          }
        }
      } else {
        ReadRows(*parts.v.tensor, head * parts.v_dim + in_head - parts.nope, n, col0, cols, dtype, dst);
      }
      dst += Bytes(n * cols, dtype);
      row += n;
    }
  }

  Located LookupGguf(const std::string& gguf_name) const {
    const auto it = tensors_.find(gguf_name);
    return it == tensors_.end() ? Located{} : it->second;
  }

  // Without a tensor where the file has none.
  View Lookup(std::string_view name) const {
    const auto gguf = FindGgufName(name);
    View view;
    if (!gguf) return view;
    static_cast<Located&>(view) = LookupGguf(gguf->tensor);
    // gate_exps and up_exps may lie in one tensor, of each expert first its gate's rows and then its up's.
    int64_t fused = 1, half = 0;
    if (view.tensor == nullptr && gguf->expert >= 0) {
      const size_t gate = gguf->tensor.find("ffn_gate_exps"), up = gguf->tensor.find("ffn_up_exps");
      if (gate == std::string::npos && up == std::string::npos) return view;
      const size_t at = std::min(gate, up);
      static_cast<Located&>(view) = LookupGguf(gguf->tensor.substr(0, at) + "ffn_gate_up_exps.weight");
      fused = 2;
      half = up == at ? 1 : 0;
    }
    if (view.tensor == nullptr) return view;
    const std::vector<uint64_t>& dims = view.tensor->dims;
    view.cols = static_cast<int64_t>(dims[0]);
    if (gguf->expert < 0) {
      // The gate of Qwen2-MoE's shared expert is a matrix of one row in Hugging Face's.
      view.vector = dims.size() == 1 && !name.ends_with(".shared_expert_gate.weight");
      view.rows = dims.size() == 1 ? 1 : static_cast<int64_t>(dims[1]);
      if (dims.size() <= 2) return view;
    } else if (dims.size() == 3 && dims[1] % static_cast<uint64_t>(fused) == 0) {
      if (gguf->expert >= static_cast<int64_t>(dims[2])) return {};
      view.rows = static_cast<int64_t>(dims[1]) / fused;
      view.first_row = (gguf->expert * fused + half) * view.rows;
      return view;
    }
    Throw("{}: tensor {} has dimensions [{}], which is not what {} needs", view.file->path(), view.tensor->name,
          fmt::join(dims, ", "), name);
  }

  View Find(std::string_view name) const {
    View at = Lookup(name);
    if (at.tensor == nullptr) NotFound(name);
    return at;
  }
  [[noreturn]] void NotFound(std::string_view name) const {
    const auto gguf = FindGgufName(name);
    Throw("tensor {} (in GGUF terms {}) is missing in {}", name, gguf ? gguf->tensor : "unknown",
          files_.size() == 1 ? files_[0].path() : fmt::format("the {} parts of {}", files_.size(), files_[0].path()));
  }

  std::vector<GgufFile> files_;
  std::unordered_map<std::string, Located> tensors_;  // by the files' own names
  bool permuted_ = false;                             // rows of q and k, see PermutedRow
  ModelConfig config_;
  int64_t total_bytes_ = 0;
};

}  // namespace

std::unique_ptr<Checkpoint> OpenGgufCheckpoint(const std::string& path, const Json& hf_overrides) {
  return std::make_unique<GgufCheckpoint>(path, hf_overrides);
}

}  // namespace weft::internal
