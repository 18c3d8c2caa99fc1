#include "weft/model/safetensors.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "weft/core/error.h"
#include "weft/model/convert.h"

namespace weft {
namespace {

using Json = nlohmann::json;

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the reference implementation's bound

struct TypeInfo {
  std::string_view name;
  int64_t bytes;
};
constexpr std::array<TypeInfo, 15> kTypes = {{{"BOOL", 1},
                                              {"U8", 1},
                                              {"I8", 1},
                                              {"F8_E4M3", 1},
                                              {"F8_E5M2", 1},
                                              {"F8_E8M0", 1},
                                              {"I16", 2},
                                              {"U16", 2},
                                              {"F16", 2},
                                              {"BF16", 2},
                                              {"I32", 4},
                                              {"U32", 4},
                                              {"F32", 4},
                                              {"I64", 8},
                                              {"F64", 8}}};

// 0 for a type not known here: its values cannot be read, but its tensors need not stop the loading of others.
int64_t ElementBytes(std::string_view dtype) {
  for (const TypeInfo& type : kTypes) {
    if (type.name == dtype) return type.bytes;
  }
  return 0;
}

// A non-negative integer that fits int64.
int64_t ToSize(const std::string& path, const std::string& name, const char* what, const Json& value) {
  if (!value.is_number_unsigned() ||
      value.get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
    Throw("{}: tensor {}: {} = {} is not a size", path, name, what, value.dump());
  }
  return value.get<int64_t>();
}

Json ParseHeader(const std::string& path, const char* text, size_t bytes) {
  // The parser keeps the last of two equal keys, so the callback looks for them.
  std::set<std::string> seen;
  const auto check = [&](int depth, Json::parse_event_t event, Json& parsed) {
    if (depth == 1 && event == Json::parse_event_t::key && !seen.insert(parsed.get<std::string>()).second) {
      Throw("{}: the header names tensor {} twice", path, parsed.get<std::string>());
    }
    return true;
  };
  try {
    return Json::parse(text, text + bytes, check);
  } catch (const Json::exception& error) {
    Throw("{}: the safetensors header is not JSON: {}", path, error.what());
  }
}

}  // namespace

int64_t SafetensorsTensor::elements() const {
  int64_t n = 1;  // the product was checked when the file was opened
  for (const int64_t d : shape) n *= d;
  return n;
}

std::optional<DType> SafetensorsTensor::type() const {
  if (dtype == "F32") return DType::kF32;
  if (dtype == "BF16") return DType::kBF16;
  if (dtype == "F16") return DType::kF16;
  if (dtype == "I64") return DType::kI64;
  if (dtype == "I32") return DType::kI32;
  if (dtype == "I8") return DType::kI8;
  if (dtype == "U8") return DType::kU8;
  return std::nullopt;
}

SafetensorsFile::SafetensorsFile(const std::string& path) : path_(path), file_(path) {
  const auto file_bytes = static_cast<int64_t>(file_.size());
  if (file_bytes < 8) Throw("{}: {} bytes are too few for a safetensors file", path, file_bytes);
  const auto header_bytes = LoadUnaligned<uint64_t>(file_.data());
  if (header_bytes > kMaxHeaderBytes || static_cast<int64_t>(header_bytes) > file_bytes - 8) {
    Throw(
        "{}: a header of {} bytes does not fit: the file has {} bytes and headers at most {} (truncated, or not "
        "safetensors)",
        path, header_bytes, file_bytes, kMaxHeaderBytes);
  }
  const Json header =
      ParseHeader(path, reinterpret_cast<const char*>(file_.data()) + 8, static_cast<size_t>(header_bytes));
  if (!header.is_object()) Throw("{}: the safetensors header is not a JSON object", path);
  const uint8_t* data = file_.data() + 8 + header_bytes;
  const int64_t data_bytes = file_bytes - 8 - static_cast<int64_t>(header_bytes);

  struct Extent {
    int64_t begin, end;
    const std::string* name;
  };
  std::vector<Extent> extents;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    if (!entry.is_object() || !entry.contains("dtype") || !entry["dtype"].is_string() || !entry.contains("shape") ||
        !entry["shape"].is_array() || !entry.contains("data_offsets") || !entry["data_offsets"].is_array() ||
        entry["data_offsets"].size() != 2) {
      Throw("{}: tensor {}: the header must give dtype, shape and two data_offsets", path, name);
    }
    SafetensorsTensor tensor;
    tensor.dtype = entry["dtype"].get<std::string>();
    const int64_t element_bytes = ElementBytes(tensor.dtype);
    int64_t want = element_bytes == 0 ? 1 : element_bytes;
    bool overflow = false;
    for (const Json& dim : entry["shape"]) {
      tensor.shape.push_back(ToSize(path, name, "a dimension", dim));
      overflow = __builtin_mul_overflow(want, tensor.shape.back(), &want) || overflow;
    }
    const int64_t begin = ToSize(path, name, "an offset", entry["data_offsets"][0]);
    const int64_t end = ToSize(path, name, "an offset", entry["data_offsets"][1]);
    if (begin > end || end > data_bytes) {
      Throw("{}: tensor {}: bytes {} to {} are not inside the {} bytes of data that the file has (truncated?)", path,
            name, begin, end, data_bytes);
    }
    if (overflow || (element_bytes != 0 && want != end - begin)) {
      Throw("{}: tensor {}: {} of shape {} does not take the {} bytes between its offsets", path, name, tensor.dtype,
            entry["shape"].dump(), end - begin);
    }
    tensor.data = data + begin;
    tensor.bytes = end - begin;
    const auto it = tensors_.emplace(name, std::move(tensor)).first;
    if (end > begin) extents.push_back({begin, end, &it->first});
  }
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < extents.size(); ++i) {
    if (extents[i].begin < extents[i - 1].end) {
      Throw("{}: tensors {} and {} overlap", path, *extents[i - 1].name, *extents[i].name);
    }
  }
}

const SafetensorsTensor* SafetensorsFile::Find(std::string_view name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : &it->second;
}

const SafetensorsTensor& SafetensorsFile::Get(std::string_view name) const {
  const SafetensorsTensor* tensor = Find(name);
  if (tensor == nullptr) Throw("{}: has no tensor {}", path_, name);
  return *tensor;
}

void SafetensorsFile::CopyBytes(std::string_view name, const SafetensorsTensor& tensor, size_t element_bytes,
                                void* dst) const {
  if (tensor.elements() * static_cast<int64_t>(element_bytes) != tensor.bytes) {
    Throw("{}: tensor {} of {} is not made of {}-byte values", path_, name, tensor.dtype, element_bytes);
  }
  if (tensor.bytes > 0) std::memcpy(dst, tensor.data, static_cast<size_t>(tensor.bytes));
}

}  // namespace weft
