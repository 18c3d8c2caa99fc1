#pragma once
// Writes GGUF files for tests (version 3, alignment 32).

#include <cstdint>
#include <string>
#include <vector>

#include "weft/core/gguf_metadata.h"
#include "weft/model/test_files.h"

namespace weft::testing {

class GgufWriter {
 public:
  void U32(const std::string& key, uint32_t value) { Append(Key(key, 4), value); }
  void F32(const std::string& key, float value) { Append(Key(key, 6), value); }
  void U16(const std::string& key, uint16_t value) { Append(Key(key, 2), value); }
  void Bool(const std::string& key, bool value) { Append(Key(key, 7), static_cast<uint8_t>(value)); }
  void String(const std::string& key, const std::string& value) { Text(Key(key, 8), value); }
  void Strings(const std::string& key, const std::vector<std::string>& values) {
    std::string& out = Key(key, 9);
    Append(out, uint32_t{8});
    Append(out, static_cast<uint64_t>(values.size()));
    for (const std::string& value : values) Text(out, value);
  }
  void I32s(const std::string& key, const std::vector<int32_t>& values) {
    std::string& out = Key(key, 9);
    Append(out, uint32_t{5});
    Append(out, static_cast<uint64_t>(values.size()));
    for (const int32_t value : values) Append(out, value);
  }
  // `dims` fastest first, as in the file.
  void Tensor(const std::string& name, const std::vector<uint64_t>& dims, uint32_t type, const std::string& bytes) {
    ++tensors_;
    Text(infos_, name);
    Append(infos_, static_cast<uint32_t>(dims.size()));
    for (const uint64_t d : dims) Append(infos_, d);
    Append(infos_, type);
    data_.resize((data_.size() + 31) / 32 * 32);
    Append(infos_, static_cast<uint64_t>(data_.size()));
    data_ += bytes;
  }
  void F32Tensor(const std::string& name, const std::vector<uint64_t>& dims, const std::vector<float>& values) {
    std::string bytes;
    for (const float value : values) Append(bytes, value);
    Tensor(name, dims, 0, bytes);
  }

  std::string Bytes() const {
    std::string out = "GGUF";
    Append(out, uint32_t{3});
    Append(out, tensors_);
    Append(out, keys_);
    out += values_ + infos_;
    out.resize((out.size() + 31) / 32 * 32);
    return out + data_;
  }

 private:
  static void Text(std::string& out, const std::string& text) {
    Append(out, static_cast<uint64_t>(text.size()));
    out += text;
  }
  std::string& Key(const std::string& key, uint32_t type) {
    ++keys_;
    Text(values_, key);
    Append(values_, type);
    return values_;
  }

  uint64_t tensors_ = 0, keys_ = 0;
  std::string values_, infos_, data_;
};

}  // namespace weft::testing
