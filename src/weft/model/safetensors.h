#pragma once
// The safetensors format: https://huggingface.co/docs/safetensors (8-byte little-endian header length, a JSON header
// {name: {dtype, shape, data_offsets}}, then the values; offsets count from the end of the header).

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "weft/core/dtype.h"
#include "weft/core/mapped_file.h"

namespace weft {

struct SafetensorsTensor {
  std::string dtype;  // as the header spells it: "F32", "BF16", "F8_E4M3" ...
  std::vector<int64_t> shape;
  const uint8_t* data = nullptr;  // inside the mapping, not always aligned to the element
  int64_t bytes = 0;
  int64_t elements() const;
  // None for the types that have no DType of ours.
  std::optional<DType> type() const;
};

// One file, mapped. The constructor checks everything that is read later: header inside the file, offsets inside the
// data and without overlap, byte counts equal to dtype x shape. Throws weft::Error naming the file, the tensor, the
// value.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::string& path);

  const std::map<std::string, SafetensorsTensor, std::less<>>& tensors() const { return tensors_; }
  const SafetensorsTensor* Find(std::string_view name) const;
  // As Find, but throws weft::Error naming tensor and file.
  const SafetensorsTensor& Get(std::string_view name) const;
  // The values of a tensor as `T`, which must be of the stored size; F16 and BF16 come as uint16_t.
  template <typename T>
  std::vector<T> Values(std::string_view name) const {
    const SafetensorsTensor& tensor = Get(name);
    std::vector<T> values(static_cast<size_t>(tensor.elements()));
    CopyBytes(name, tensor, sizeof(T), values.data());
    return values;
  }
  const std::string& path() const { return path_; }

 private:
  void CopyBytes(std::string_view name, const SafetensorsTensor& tensor, size_t element_bytes, void* dst) const;

  std::string path_;
  MappedFile file_;
  std::map<std::string, SafetensorsTensor, std::less<>> tensors_;
};

}  // namespace weft
