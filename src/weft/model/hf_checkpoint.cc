// A folder in Hugging Face layout: config.json and safetensors files.
#include <algorithm>
#include <filesystem>
#include <map>
#include <regex>

#include "weft/core/error.h"
#include "weft/model/checkpoint_files.h"
#include "weft/model/convert.h"
#include "weft/model/file_io.h"
#include "weft/model/safetensors.h"

namespace weft::internal {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

struct Location {
  const SafetensorsFile* file;
  const SafetensorsTensor* tensor;
};

class HfCheckpoint : public Checkpoint {
 public:
  HfCheckpoint(const std::string& folder, const Json& hf_overrides) : folder_(folder) {
    LoadConfig(hf_overrides);
    if (fs::exists(fs::path(folder) / kIndex)) {
      OpenIndexed();
    } else {
      OpenAll();
    }
  }

  const ModelConfig& config() const override { return config_; }
  bool Has(std::string_view name) const override { return tensors_.find(name) != tensors_.end(); }

  std::vector<int64_t> Shape(std::string_view name) const override { return Find(name).tensor->shape; }

  DType NaturalDType(std::string_view name) const override {
    const Location at = Find(name);
    return !IsFp8(at) && FloatType(name, at) == DType::kBF16 ? DType::kBF16 : DType::kF32;
  }

  void Read(std::string_view name, int64_t row0, int64_t rows, int64_t col0, int64_t cols, DType dtype,
            void* dst) const override {
    const Location at = Find(name);
    const SafetensorsTensor& tensor = *at.tensor;
    if (tensor.shape.empty() || tensor.shape.size() > 2) {
      Throw("{}: tensor {} has {} dimensions; vectors and matrices are read", at.file->path(), name,
            tensor.shape.size());
    }
    const int64_t all_rows = tensor.shape.size() == 2 ? tensor.shape[0] : 1;
    const int64_t all_cols = tensor.shape.back();
    CheckSlice(name, all_rows, all_cols, row0, rows, col0, cols);
    if (IsFp8(at)) {
      ReadFp8(name, at, row0, rows, col0, cols, dtype, static_cast<uint8_t*>(dst));
      return;
    }
    const DType stored = FloatType(name, at);
    const auto width = static_cast<int64_t>(SizeOf(stored));
    const uint8_t* begin = tensor.data + row0 * all_cols * width;
    if (cols == all_cols) {  // whole rows lie together
      ReadAhead(begin, rows * cols * width);
      ConvertValues(stored, begin, dtype, dst, rows * cols);
    } else {
      auto* out = static_cast<uint8_t*>(dst);
      for (int64_t row = 0; row < rows; ++row) {
        ConvertValues(stored, begin + (row * all_cols + col0) * width, dtype, out, cols);
        out += static_cast<size_t>(cols) * SizeOf(dtype);
      }
    }
    ReadDone(begin, rows * all_cols * width);
  }

  int64_t total_bytes() const override { return total_bytes_; }

 private:
  // FP8 values times the scales of their blocks, which a tensor beside them holds.
  void ReadFp8(std::string_view name, const Location& at, int64_t row0, int64_t rows, int64_t col0, int64_t cols,
               DType dtype, uint8_t* dst) const {
    if (!config_.fp8_blocks) {
      Throw("{}: tensor {} has type F8_E4M3, but config.json has no quantization_config of quant_method fp8",
            at.file->path(), name);
    }
    const SafetensorsTensor& tensor = *at.tensor;
    const Fp8Blocks& block = *config_.fp8_blocks;
    const int64_t all_rows = tensor.shape.size() == 2 ? tensor.shape[0] : 1;
    const int64_t all_cols = tensor.shape.back();
    const int64_t scale_cols = (all_cols + block.cols - 1) / block.cols;
    const std::string scale_name = std::string(name) + "_scale_inv";
    const Location scales = Find(scale_name);
    const std::vector<int64_t> want = {(all_rows + block.rows - 1) / block.rows, scale_cols};
    if (scales.tensor->shape != want) {
      Throw("{}: tensor {} has shape [{}], but {} blocks of {} x {} of {} ask for [{}]", scales.file->path(),
            scale_name, fmt::join(scales.tensor->shape, ", "), want[0] * want[1], block.rows, block.cols, name,
            fmt::join(want, ", "));
    }
    const DType scale_type = FloatType(scale_name, scales);
    const auto scale_width = static_cast<int64_t>(SizeOf(scale_type));

    const uint8_t* src = tensor.data + row0 * all_cols;
    if (cols == all_cols) ReadAhead(src, rows * cols);
    const int64_t first = col0 / block.cols;
    std::vector<float> scale_row(static_cast<size_t>((col0 + cols + block.cols - 1) / block.cols - first));
    int64_t loaded = -1;  // the row of blocks that scale_row is of
    for (int64_t row = row0; row < row0 + rows; ++row, src += all_cols) {
      if (row / block.rows != loaded) {
        loaded = row / block.rows;
        ConvertValues(scale_type, scales.tensor->data + (loaded * scale_cols + first) * scale_width, DType::kF32,
                      scale_row.data(), static_cast<int64_t>(scale_row.size()));
      }
      for (int64_t col = col0; col < col0 + cols;) {
        const int64_t at_block = col / block.cols;
        const int64_t n = std::min(col0 + cols, (at_block + 1) * block.cols) - col;
        ConvertFp8E4m3(src + col, scale_row[static_cast<size_t>(at_block - first)], dtype, dst, n);
        dst += static_cast<size_t>(n) * SizeOf(dtype);
        col += n;
      }
    }
    ReadDone(tensor.data + row0 * all_cols, rows * all_cols);
  }

  static constexpr const char* kIndex = "model.safetensors.index.json";

  std::string PathOf(const std::string& file) const { return (fs::path(folder_) / file).string(); }

  void LoadConfig(const Json& hf_overrides) {
    const std::string path = PathOf("config.json");
    if (!fs::exists(path)) Throw("{}: is missing; a model's folder must have it", path);
    Json json = ReadJsonFile(path);
    try {
      ApplyConfigOverrides(hf_overrides, json);
      config_ = ParseModelConfig(json);
      const std::string generation = PathOf("generation_config.json");
      if (fs::exists(generation)) AddGenerationConfig(ReadJsonFile(generation), config_);
    } catch (const Error& error) {
      throw Error(fmt::format("{}: {}", folder_, error.what()), error.kind(), error.param());
    }
  }

  void OpenIndexed() {
    const std::string index_path = PathOf(kIndex);
    const Json index = ReadJsonFile(index_path);
    if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object()) {
      Throw("{}: has no weight_map", index_path);
    }
    std::map<std::string, const SafetensorsFile*> shards;
    for (const auto& [name, value] : index["weight_map"].items()) {
      const std::string file = value.is_string() ? value.get<std::string>() : "";
      // Only files of this folder: an index must not be a way to others.
      if (file.empty() || file == "." || file == ".." ||
          file.find_first_of(std::string_view("/\\\0", 3)) != file.npos) {
        Throw("{}: weight_map: {} is said to lie in {}, which is not the name of a file", index_path, name,
              value.dump());
      }
      const SafetensorsFile*& shard = shards[file];
      if (shard == nullptr) {
        if (!fs::exists(PathOf(file))) {
          throw Error(fmt::format("{}: is missing; {} says that it holds {}", PathOf(file), kIndex, name),
                      ErrorKind::kNotFound);
        }
        shard = Open(file);
      }
      const SafetensorsTensor* tensor = shard->Find(name);
      if (tensor == nullptr) Throw("{}: has no tensor {}, although {} says so", shard->path(), name, kIndex);
      Add(name, shard, tensor);
    }
  }

  void OpenAll() {
    std::vector<std::string> names;
    if (fs::exists(PathOf("model.safetensors"))) {
      names.push_back("model.safetensors");  // files beside it are something else: adapters, the original's copy ...
    } else {
      for (const fs::directory_entry& entry : fs::directory_iterator(folder_)) {
        if (entry.path().extension() == ".safetensors") names.push_back(entry.path().filename().string());
      }
    }
    if (names.empty()) Throw("{}: has no *.safetensors file", folder_);
    std::sort(names.begin(), names.end());
    for (const std::string& name : names) RequireOtherShards(name);
    for (const std::string& name : names) {
      const SafetensorsFile* file = Open(name);
      for (const auto& [tensor_name, tensor] : file->tensors()) Add(tensor_name, file, &tensor);
    }
  }

  // "model-00002-of-00003.safetensors" says which files there must be besides, where no index does.
  void RequireOtherShards(const std::string& name) const {
    static const std::regex kShard("(.*-)[0-9]{5}-of-([0-9]{5})\\.safetensors");
    std::smatch match;
    if (!std::regex_match(name, match, kShard)) return;
    for (int part = 1, parts = std::stoi(match[2]); part <= parts; ++part) {
      const std::string other = fmt::format("{}{:05}-of-{:05}.safetensors", match[1].str(), part, parts);
      if (!fs::exists(PathOf(other))) {
        throw Error(fmt::format("{}: is missing; {} is one of {} files", PathOf(other), name, parts),
                    ErrorKind::kNotFound);
      }
    }
  }

  const SafetensorsFile* Open(const std::string& file) {
    return files_.emplace_back(std::make_unique<SafetensorsFile>(PathOf(file))).get();
  }

  void Add(const std::string& name, const SafetensorsFile* file, const SafetensorsTensor* tensor) {
    const auto [it, added] = tensors_.emplace(name, Location{file, tensor});
    if (!added) Throw("tensor {} is both in {} and in {}", name, it->second.file->path(), file->path());
    total_bytes_ += tensor->bytes;
  }

  Location Find(std::string_view name) const {
    const auto it = tensors_.find(name);
    if (it != tensors_.end()) return it->second;
    Throw(
        "tensor {} is missing in {}", name,
        files_.size() == 1 ? files_[0]->path() : fmt::format("the {} safetensors files of {}", files_.size(), folder_));
  }

  static bool IsFp8(const Location& at) { return at.tensor->dtype == "F8_E4M3"; }

  static DType FloatType(std::string_view name, const Location& at) {
    const auto type = at.tensor->type();
    if (type == DType::kF32 || type == DType::kBF16 || type == DType::kF16) return *type;
    Throw("{}: tensor {} has type {}; F32, F16, BF16 and F8_E4M3 can be read", at.file->path(), name, at.tensor->dtype);
  }

  std::string folder_;
  ModelConfig config_;
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::map<std::string, Location, std::less<>> tensors_;
  int64_t total_bytes_ = 0;
};

}  // namespace

std::unique_ptr<Checkpoint> OpenHfCheckpoint(const std::string& folder, const Json& hf_overrides) {
  return std::make_unique<HfCheckpoint>(folder, hf_overrides);
}

}  // namespace weft::internal
