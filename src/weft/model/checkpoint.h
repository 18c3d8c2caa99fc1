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

// An open model: its config, and its tensors as [rows, cols] of f32 or bf16.
class Checkpoint {
 public:
  virtual ~Checkpoint() = default;

  virtual const ModelConfig& config() const = 0;
  virtual bool Has(std::string_view name) const = 0;
  // [rows, cols] of a matrix, {n} of a vector. Throws weft::Error naming the tensor and the file when it is missing.
  virtual std::vector<int64_t> Shape(std::string_view name) const = 0;
  // kF32 or kBF16: what the values can be read as without loss (quantised, FP8 and f16 ones: kF32).
  virtual DType NaturalDType(std::string_view name) const = 0;
  // Reads rows [row0, row0+rows) x columns [col0, col0+cols) (a vector is one row) as `dtype` (kF32 or kBF16,
  // rounded to nearest even where it loses) to dst, row-major without gaps. Only these bytes of the file are touched
  // (of quantised tensors: the blocks that hold them). Throws weft::Error for a tensor that is missing, of a type that
  // cannot be read, or smaller than the slice. Thread-safe.
  virtual void Read(std::string_view name, int64_t row0, int64_t rows, int64_t col0, int64_t cols, DType dtype,
                    void* dst) const = 0;
  // Bytes of all tensors in the files.
  virtual int64_t total_bytes() const = 0;
};

// `path`: a folder in Hugging Face layout (config.json, [generation_config.json,] *.safetensors [with
// model.safetensors.index.json]) or a .gguf file (of a split model: its first part).
// `hf_overrides` (an object or null) replaces fields of config.json, or of what a GGUF's metadata say in its terms.
// Throws weft::Error.
std::unique_ptr<Checkpoint> OpenCheckpoint(const std::string& path, const nlohmann::json& hf_overrides = {});

}  // namespace weft
