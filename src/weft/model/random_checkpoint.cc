#include "weft/model/random_checkpoint.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <vector>

#include "weft/core/error.h"
#include "weft/model/config.h"

namespace weft {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr int64_t kChunk = 1 << 20;  // values generated and written at a time
constexpr size_t kQuantiles = 1 << 16;

// One output of SplitMix64 (Steele, Lea and Flood 2014) from a counter.
uint64_t Mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}
constexpr uint64_t kStep = 0x9e3779b97f4a7c15u;

uint64_t KeyOf(const std::string& name, uint64_t seed) {
  uint64_t key = Mix(seed + kStep);
  for (const char c : name) key = Mix(key + kStep + static_cast<unsigned char>(c));
  return key;
}

// x[i] such that a standard normal value lies below it with probability (i + 1/2) / n: 16 random bits choose a normal
// value by one look-up, which is all the precision that weights of a benchmark need.
std::vector<float> NormalQuantiles() {
  std::vector<float> x(kQuantiles);
  double at = 0.0;
  for (size_t i = kQuantiles / 2; i < kQuantiles; ++i) {
    const double above = 1.0 - (static_cast<double>(i) + 0.5) / kQuantiles;
    for (int step = 0; step < 8; ++step) {  // Newton, from the neighbour's value
      const double density = std::exp(-0.5 * at * at) / std::sqrt(2.0 * M_PI);
      at += (0.5 * std::erfc(at / std::sqrt(2.0)) - above) / density;
    }
    x[i] = static_cast<float>(at);
    x[kQuantiles - 1 - i] = static_cast<float>(-at);
  }
  return x;
}

template <typename T>
class TensorWriter {
 public:
  TensorWriter(const std::vector<float>& quantiles, const ModelTensor& tensor, uint64_t seed)
      : key_(KeyOf(tensor.name, seed)), table_(kQuantiles) {
    const double mean = tensor.kind == ModelTensor::Kind::kNorm ? 1.0 : 0.0;
    const double deviation = tensor.rows == 0 ? 0.1 : 1.0 / std::sqrt(static_cast<double>(tensor.cols));
    for (size_t i = 0; i < kQuantiles; ++i) {
      const auto value = static_cast<float>(mean + deviation * static_cast<double>(quantiles[i]));
      if constexpr (sizeof(T) == 2) {
        table_[i] = ToBf16(value).bits;
      } else {
        table_[i] = value;
      }
    }
  }

  // Values [begin, begin + n); begin is a multiple of 4. Writes up to 3 more, which `out` must have room for.
  void Generate(int64_t begin, int64_t n, T* out) const {
    auto counter = key_ + static_cast<uint64_t>(begin / 4) * kStep;
    for (int64_t i = 0; i < n; i += 4, counter += kStep) {
      const uint64_t random = Mix(counter);
      for (int j = 0; j < 4; ++j) out[i + j] = table_[(random >> (16 * j)) & 0xffff];
    }
  }

 private:
  uint64_t key_;
  std::vector<T> table_;
};

class File {
 public:
  explicit File(const std::string& path) : path_(path), stream_(path, std::ios::binary | std::ios::trunc) { Check(); }
  void Write(const void* data, size_t bytes) {
    stream_.write(static_cast<const char*>(data), static_cast<std::streamsize>(bytes));
    Check();
  }
  void Close() {
    stream_.close();
    Check();
  }

 private:
  void Check() const {
    if (!stream_) Throw("{}: cannot be written: {}", path_, std::strerror(errno));
  }
  std::string path_;
  std::ofstream stream_;
};

template <typename T>
void WriteTensor(const std::vector<float>& quantiles, const ModelTensor& tensor, const RandomCheckpointOptions& options,
                 std::vector<char>& buffer, File& file) {
  const TensorWriter<T> writer(quantiles, tensor, options.seed);
  buffer.resize(kChunk * sizeof(T));
  auto* values = reinterpret_cast<T*>(buffer.data());  // operator new aligns it
  for (int64_t at = 0; at < tensor.elements(); at += kChunk) {
    const int64_t n = std::min(kChunk, tensor.elements() - at);
    writer.Generate(at, n, values);
    file.Write(values, static_cast<size_t>(n) * sizeof(T));
    if (options.on_bytes) options.on_bytes(n * static_cast<int64_t>(sizeof(T)));
  }
}

std::vector<int64_t> ShapeOf(const ModelTensor& tensor) {
  if (tensor.rows == 0) return {tensor.cols};
  return {tensor.rows, tensor.cols};
}

int64_t IntOf(const Json& config, const char* name, int64_t absent) {
  const auto it = config.find(name);
  return it != config.end() && it->is_number_integer() ? it->get<int64_t>() : absent;
}

void CutLayers(int64_t layers, Json& config) {
  config["num_hidden_layers"] = layers;
  if (auto types = config.find("layer_types"); types != config.end() && types->is_array()) {
    while (static_cast<int64_t>(types->size()) > layers) types->erase(types->size() - 1);
  }
  const int64_t dense = IntOf(config, "first_k_dense_replace", 0);
  if (dense >= layers) config["first_k_dense_replace"] = layers - 1;
}

void CutExperts(int64_t experts, Json& config) {
  const char* name = "";
  for (const char* candidate : {"n_routed_experts", "num_experts", "num_local_experts"}) {
    if (IntOf(config, candidate, 0) > 0) name = candidate;
  }
  const int64_t all = IntOf(config, name, 0);
  if (experts > all) Throw("{} experts: the config has {}", experts, all);
  config[name] = experts;
  const int64_t per_token = std::min(IntOf(config, "num_experts_per_tok", experts), experts);
  config["num_experts_per_tok"] = per_token;
  int64_t groups = IntOf(config, "n_group", 1);
  if (groups <= 1) return;
  while (groups > 1 && (experts % groups != 0 || experts / groups < 2)) --groups;
  const int64_t needed = (per_token + experts / groups - 1) / (experts / groups);
  config["n_group"] = groups;
  config["topk_group"] = std::clamp(IntOf(config, "topk_group", groups), needed, groups);
}

}  // namespace

Json CutConfig(Json config, const ConfigCut& cut) {
  const ModelConfig whole = ParseModelConfig(config);
  if (cut.layers > whole.num_layers) Throw("{} layers: the config has {}", cut.layers, whole.num_layers);
  if (cut.layers > 0) CutLayers(cut.layers, config);
  if (cut.experts > 0) CutExperts(cut.experts, config);
  return config;
}

int64_t WriteRandomCheckpoint(const Json& config, const std::string& folder, const RandomCheckpointOptions& options) {
  if (options.dtype != DType::kBF16 && options.dtype != DType::kF32) {
    Throw("dtype {}: random checkpoints are bfloat16 or float32", NameOf(options.dtype));
  }
  if (options.max_shard_bytes <= 0) Throw("shard size {}: must be above 0", options.max_shard_bytes);
  const bool bf16 = options.dtype == DType::kBF16;
  const auto width = static_cast<int64_t>(SizeOf(options.dtype));
  const std::vector<ModelTensor> tensors = ModelTensors(ParseModelConfig(config));

  std::error_code error;
  fs::create_directories(folder, error);
  if (error) Throw("{}: cannot be made: {}", folder, error.message());
  for (const fs::directory_entry& entry : fs::directory_iterator(folder, error)) {
    if (entry.path().filename() == "config.json" || entry.path().extension() == ".safetensors") {
      Throw("{}: holds {} already; give a new folder", folder, entry.path().filename().string());
    }
  }
  if (error) Throw("{}: cannot be read: {}", folder, error.message());

  std::vector<std::vector<const ModelTensor*>> shards(1);
  int64_t shard_bytes = 0, total_bytes = 0;
  for (const ModelTensor& tensor : tensors) {
    const int64_t bytes = tensor.elements() * width;
    if (!shards.back().empty() && bytes > options.max_shard_bytes - shard_bytes) {
      shards.emplace_back();
      shard_bytes = 0;
    }
    shards.back().push_back(&tensor);
    shard_bytes += bytes;
    total_bytes += bytes;
  }

  const std::vector<float> quantiles = NormalQuantiles();
  std::vector<char> buffer;
  Json weight_map = Json::object();
  for (size_t s = 0; s < shards.size(); ++s) {
    const std::string name = shards.size() == 1 ? "model.safetensors"
                                                : fmt::format("model-{:05}-of-{:05}.safetensors", s + 1, shards.size());
    Json header = {{"__metadata__", {{"format", "pt"}}}};
    int64_t offset = 0;
    for (const ModelTensor* tensor : shards[s]) {
      const int64_t end = offset + tensor->elements() * width;
      header[tensor->name] = {
          {"dtype", bf16 ? "BF16" : "F32"}, {"shape", ShapeOf(*tensor)}, {"data_offsets", {offset, end}}};
      weight_map[tensor->name] = name;
      offset = end;
    }
    std::string text = header.dump();
    text.append((64 - (text.size() + 8) % 64) % 64, ' ');  // the data begin at a multiple of 64
    File file((fs::path(folder) / name).string());
    const uint64_t header_bytes = text.size();
    file.Write(&header_bytes, sizeof(header_bytes));
    file.Write(text.data(), text.size());
    for (const ModelTensor* tensor : shards[s]) {
      if (bf16) {
        WriteTensor<uint16_t>(quantiles, *tensor, options, buffer, file);
      } else {
        WriteTensor<float>(quantiles, *tensor, options, buffer, file);
      }
    }
    file.Close();
  }
  const auto write_json = [&](const char* name, const Json& json) {
    const std::string text = json.dump(2) + "\n";
    File file((fs::path(folder) / name).string());
    file.Write(text.data(), text.size());
    file.Close();
  };
  if (shards.size() > 1) {
    write_json("model.safetensors.index.json",
               {{"metadata", {{"total_size", total_bytes}}}, {"weight_map", weight_map}});
  }
  // Last: a folder whose writing was cut off has no config.json and is refused.
  Json copy = config;
  for (const char* name : {"dtype", "quantization_config", "num_nextn_predict_layers"}) copy.erase(name);
  copy["torch_dtype"] = NameOf(options.dtype);
  write_json("config.json", copy);
  return total_bytes;
}

}  // namespace weft
