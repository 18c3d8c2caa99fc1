#pragma once
// Checkpoints of random weights in Hugging Face layout: a model's shape without its download.

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>

#include "weft/core/dtype.h"

namespace weft {

struct RandomCheckpointOptions {
  uint64_t seed = 0;
  DType dtype = DType::kBF16;                  // or kF32
  int64_t max_shard_bytes = int64_t{4} << 30;  // of tensor data; a larger tensor gets a file of its own
  std::function<void(int64_t)> on_bytes = {};  // told of the bytes written, may be empty
};

// `config` (of a config.json) with fewer layers and experts; 0 leaves as many as there are. At least one layer keeps
// its experts: dense layers at the beginning go first, down to none (first_k_dense_replace). Of fewer experts no more
// than there are go to a token, and groups stay equal ones of two at least. Throws weft::Error for a number that is
// above the config's or for experts of a model that has none.
struct ConfigCut {
  int64_t layers = 0;
  int64_t experts = 0;
};
nlohmann::json CutConfig(nlohmann::json config, const ConfigCut& cut);

// Writes config.json (a copy of `config` with torch_dtype set, without quantization and layers that guess tokens) and
// model.safetensors, or model-0000i-of-0000n.safetensors with their index, to `folder`, which is made and must hold no
// model yet. Matrices are normal with variance 1 / columns, norms 1 + 0.1 n, biases 0.1 n: activations keep their size
// through any number of layers. A value depends on the seed, the name of the tensor and its place in it, and not on the
// dtype (but for the rounding) or the cut into files. Streams with a few MiB of memory. Throws weft::Error, also when
// the disk is full. Returns the bytes of tensor data.
int64_t WriteRandomCheckpoint(const nlohmann::json& config, const std::string& folder,
                              const RandomCheckpointOptions& options);

}  // namespace weft
