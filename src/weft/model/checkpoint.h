#pragma once
// The weights of a model by their Hugging Face names, whatever file they lie in.

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "weft/core/dtype.h"
#include "weft/model/config.h"

namespace weft {

// What a tokenizer needs from the model's place: a folder (tokenizer.json ...) or a GGUF file's vocabulary.
class Checkpoint {
 public:
  virtual ~Checkpoint() = default;

  virtual const ModelConfig& config() const = 0;
  virtual bool Has(std::string_view name) const = 0;
  // [rows, cols] of a matrix, {n} of a vector. Throws weft::Error naming the tensor and the file when it is missing.
  virtual std::vector<int64_t> Shape(std::string_view name) const = 0;
  // kF32 or kBF16: what the values can be read as without loss (quantised and f16 ones: kF32).
  virtual DType NaturalDType(std::string_view name) const = 0;
  // Reads rows [row0, row0+rows) x columns [col0, col0+cols) (a vector is one row) as `dtype` (kF32 or kBF16,
  // rounded to nearest even where it loses) to dst, row-major without gaps. Only these bytes of the file are touched.
  // Thread-safe.
  virtual void Read(std::string_view name, int64_t row0, int64_t rows, int64_t col0, int64_t cols, DType dtype,
                    void* dst) const = 0;
  // Bytes of all tensors in the files (for the progress bar).
  virtual int64_t total_bytes() const = 0;
};

// `path`: a folder in Hugging Face layout (config.json, *.safetensors [, model.safetensors.index.json]) or a .gguf file.
// `hf_overrides` are merged into config.json. Throws weft::Error.
std::unique_ptr<Checkpoint> OpenCheckpoint(const std::string& path, const nlohmann::json& hf_overrides = {});

}  // namespace weft
