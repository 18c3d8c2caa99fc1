#pragma once
// The header of a GGUF file: key/values and where the tensors lie. The tensors' values are read by others.
// Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "weft/core/mapped_file.h"

namespace weft {

// A storage format of ggml: `block_elements` values take `block_bytes` bytes.
struct GgmlTypeInfo {
  uint32_t type;  // as numbered in the file
  const char* name;
  uint32_t block_elements;
  uint32_t block_bytes;
};
// nullptr for a number that ggml does not use (any more).
const GgmlTypeInfo* FindGgmlType(uint32_t type);

struct GgufTensorInfo {
  std::string name;
  std::vector<uint64_t> dims;  // 1 to 4; dims[0] runs fastest, so a [rows, cols] matrix has dims {cols, rows}
  GgmlTypeInfo type;
  uint64_t elements = 0;
  uint64_t bytes = 0;             // of its data
  const uint8_t* data = nullptr;  // in the mapping, all `bytes` of it inside the file
};

// Everything is checked while opening: counts against what is left of the file, sums and products in 64 bits, each
// tensor's extent against the file's size. A malformed file throws weft::Error that names the file, what is wrong and
// its value. The views handed out live as long as the GgufFile (moving it keeps them valid).
class GgufFile {
 public:
  static GgufFile Open(const std::string& path);

  const std::string& path() const { return path_; }
  uint32_t version() const { return version_; }
  uint64_t alignment() const { return alignment_; }      // bytes, a power of two
  uint64_t data_offset() const { return data_offset_; }  // where the first tensor's data may begin
  uint64_t file_bytes() const { return map_.size(); }
  const std::vector<GgufTensorInfo>& tensors() const { return tensors_; }
  // nullptr when there is none of this name.
  const GgufTensorInfo* FindTensor(std::string_view name) const;

  bool Has(std::string_view key) const { return values_.find(std::string(key)) != values_.end(); }
  // Keys in the order of the file.
  const std::vector<std::string>& keys() const { return keys_; }

  // nullopt when the key is missing; weft::Error naming file and key when its value is of another type, does not fit,
  // or is text that is not UTF-8.
  std::optional<std::string_view> GetString(std::string_view key) const;
  std::optional<uint64_t> GetU64(std::string_view key) const;  // any integer type, not negative
  std::optional<int64_t> GetI64(std::string_view key) const;   // any integer type
  std::optional<double> GetF64(std::string_view key) const;    // float or integer
  std::optional<bool> GetBool(std::string_view key) const;
  std::optional<std::vector<std::string_view>> GetStringArray(std::string_view key) const;
  std::optional<std::vector<int64_t>> GetI64Array(std::string_view key) const;  // integers or booleans
  std::optional<std::vector<float>> GetF32Array(std::string_view key) const;    // f32 or f64
  bool IsArray(std::string_view key) const;

  // As above, but a missing key is an error too.
  std::string_view RequireString(std::string_view key) const;
  uint64_t RequireU64(std::string_view key) const;
  double RequireF64(std::string_view key) const;

 private:
  enum class Type : uint32_t { kU8, kI8, kU16, kI16, kU32, kI32, kF32, kBool, kString, kArray, kU64, kI64, kF64 };
  struct Value {
    Type type;  // of the value, or of the elements of an array
    bool array;
    uint64_t count;       // elements; 1 for what is no array
    const uint8_t* data;  // the first element
  };
  class Parser;

  static const char* NameOf(Type type);
  static size_t WidthOf(Type type);
  const Value* Find(std::string_view key) const;
  const Value* FindScalar(std::string_view key, const char* wanted) const;
  const Value* FindArray(std::string_view key, const char* wanted) const;
  [[noreturn]] void WrongType(std::string_view key, const Value& value, const char* wanted) const;
  [[noreturn]] void Missing(std::string_view key) const;
  std::string_view StringAt(std::string_view key, const uint8_t*& position) const;
  static bool IsInteger(Type type);
  static bool IntegerFits(Type type, const uint8_t* data);  // in int64
  static int64_t IntegerAt(Type type, const uint8_t* data);

  std::string path_;
  MappedFile map_;
  uint32_t version_ = 0;
  uint64_t alignment_ = 32;
  uint64_t data_offset_ = 0;
  std::vector<std::string> keys_;
  std::unordered_map<std::string, Value> values_;
  std::vector<GgufTensorInfo> tensors_;
  std::unordered_map<std::string, size_t> tensor_index_;
};

}  // namespace weft
