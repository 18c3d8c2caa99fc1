#include "weft/model/gguf_checkpoint.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <vector>

#include "weft/core/error.h"
#include "weft/model/checkpoint_files.h"
#include "weft/model/convert.h"
#include "weft/model/dequant.h"
#include "weft/model/file_io.h"

namespace weft::internal {
namespace {

using Json = nlohmann::json;

constexpr int64_t kReadAheadBytes = 256 << 10;
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
      for (const GgufTensorInfo& tensor : file.tensors()) total_bytes_ += static_cast<int64_t>(tensor.bytes);
    }
    permuted_ = files_[0].RequireString("general.architecture") == "llama";
    LoadConfig(hf_overrides);
  }

  const ModelConfig& config() const override { return config_; }
  bool Has(std::string_view name) const override { return Lookup(name).tensor != nullptr; }

  std::vector<int64_t> Shape(std::string_view name) const override {
    std::vector<int64_t> shape;
    for (const uint64_t d : Find(name).tensor->dims) shape.insert(shape.begin(), static_cast<int64_t>(d));
    return shape;
  }

  DType NaturalDType(std::string_view name) const override {
    return Find(name).tensor->type.type == kGgmlBF16 ? DType::kBF16 : DType::kF32;
  }

  void Read(std::string_view name, int64_t row0, int64_t rows, int64_t col0, int64_t cols, DType dtype,
            void* dst) const override {
    const Located at = Find(name);
    const GgufTensorInfo& tensor = *at.tensor;
    if (!CanDequantise(tensor.type.type)) {
      Throw("{}: tensor {} has type {}; F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K and Q6_K can be read",
            at.file->path(), tensor.name, tensor.type.name);
    }
    if (tensor.dims.size() > 2) {
      Throw("{}: tensor {} has {} dimensions; vectors and matrices are read", at.file->path(), tensor.name,
            tensor.dims.size());
    }
    const auto all_cols = static_cast<int64_t>(tensor.dims[0]);
    const bool vector = tensor.dims.size() == 1;
    const int64_t all_rows = vector ? 1 : static_cast<int64_t>(tensor.dims[1]);
    CheckSlice(name, all_rows, all_cols, row0, rows, col0, cols);
    if (rows == 0 || cols == 0) return;

    const auto out = static_cast<uint8_t*>(dst);
    if (!IsPermuted(name)) {
      ReadRows(tensor, row0, rows, col0, cols, dtype, out);
    } else if (vector) {  // a bias: its elements are in the order of the rows
      RequireWholeHeads(at, all_cols);
      for (int64_t i = 0; i < cols; ++i) {
        ReadRows(tensor, 0, 1, PermutedRow(col0 + i, config_.head_dim), 1, dtype, out + Bytes(i, dtype));
      }
    } else {
      RequireWholeHeads(at, all_rows);
      for (int64_t i = 0; i < rows; ++i) {
        ReadRows(tensor, PermutedRow(row0 + i, config_.head_dim), 1, col0, cols, dtype, out + Bytes(i * cols, dtype));
      }
    }
  }

  int64_t total_bytes() const override { return total_bytes_; }

 private:
  struct Located {
    const GgufFile* file = nullptr;
    const GgufTensorInfo* tensor = nullptr;
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
      for (const GgufTensorInfo& tensor : files_.back().tensors()) {
        for (size_t i = 0; i + 1 < files_.size(); ++i) {
          if (files_[i].FindTensor(tensor.name) != nullptr) {
            Throw("tensor {} is both in {} and in {}", tensor.name, files_[i].path(), path);
          }
        }
      }
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
      const Located embedding = Lookup("model.embed_tokens.weight");
      if (embedding.tensor != nullptr && embedding.tensor->dims.size() == 2) {
        json["vocab_size"] = embedding.tensor->dims[1];
      }
      json["tie_word_embeddings"] = !Has("lm_head.weight");
      ApplyConfigOverrides(hf_overrides, json);
      config_ = ParseModelConfig(json);
    } catch (const Error& error) {
      const std::string text = error.what();
      if (text.starts_with(file.path())) throw;
      throw Error(fmt::format("{}: {}", file.path(), text), error.kind(), error.param());
    }
    const std::string layer = "model.layers.0.";
    config_.qkv_bias = Has(layer + "self_attn.q_proj.bias");
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
    if (cols == all_cols && rows * row_bytes >= kReadAheadBytes) ReadAhead(src, rows * row_bytes);
    if (const auto plain = PlainType(tensor.type.type)) {
      if (cols == all_cols) {
        ConvertValues(*plain, src, dtype, dst, rows * cols);
        return;
      }
      for (int64_t row = 0; row < rows; ++row) {
        ConvertValues(*plain, src + row * row_bytes + col0 * block_bytes, dtype, dst + Bytes(row * cols, dtype), cols);
      }
      return;
    }
    // Through a few blocks of f32, from the block that holds the first column on.
    constexpr int64_t kStaging = 1024;  // a multiple of every block
    float staging[kStaging];
    for (int64_t row = 0; row < rows; ++row) {
      uint8_t* out = dst + Bytes(row * cols, dtype);
      for (int64_t col = col0; col < col0 + cols;) {
        const int64_t first_block = col / block;
        const int64_t end = std::min(col0 + cols, first_block * block + kStaging);
        const int64_t blocks = (end + block - 1) / block - first_block;
        Dequantise(tensor.type.type, src + row * row_bytes + first_block * block_bytes, blocks, staging);
        ConvertValues(DType::kF32, staging + (col - first_block * block), dtype, out, end - col);
        out += Bytes(end - col, dtype);
        col = end;
      }
    }
  }

  Located LookupGguf(std::string_view gguf_name) const {
    for (const GgufFile& file : files_) {
      if (const GgufTensorInfo* tensor = file.FindTensor(gguf_name)) return {&file, tensor};
    }
    return {};
  }
  Located Lookup(std::string_view name) const {
    const auto gguf_name = GgufTensorName(name);
    return gguf_name ? LookupGguf(*gguf_name) : Located{};
  }
  Located Find(std::string_view name) const {
    const Located at = Lookup(name);
    if (at.tensor == nullptr) {
      Throw("tensor {} (in GGUF terms {}) is missing in {}", name, GgufTensorName(name).value_or("unknown"),
            files_.size() == 1 ? files_[0].path() : fmt::format("the {} parts of {}", files_.size(), files_[0].path()));
    }
    return at;
  }

  std::vector<GgufFile> files_;
  bool permuted_ = false;  // rows of q and k, see PermutedRow
  ModelConfig config_;
  int64_t total_bytes_ = 0;
};

}  // namespace

std::unique_ptr<Checkpoint> OpenGgufCheckpoint(const std::string& path, const Json& hf_overrides) {
  return std::make_unique<GgufCheckpoint>(path, hf_overrides);
}

}  // namespace weft::internal
