#include "weft/core/gguf_metadata.h"

#include <bit>
#include <cstring>
#include <limits>

#include "weft/core/error.h"
#include "weft/core/utf8.h"

namespace weft {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF values are read in place");

// ggml.h (enum ggml_type) and the block structures of ggml-common.h. Numbers missing here were removed from ggml.
constexpr GgmlTypeInfo kTypes[] = {
    {0, "F32", 1, 4},         {1, "F16", 1, 2},         {2, "Q4_0", 32, 18},      {3, "Q4_1", 32, 20},
    {6, "Q5_0", 32, 22},      {7, "Q5_1", 32, 24},      {8, "Q8_0", 32, 34},      {9, "Q8_1", 32, 36},
    {10, "Q2_K", 256, 84},    {11, "Q3_K", 256, 110},   {12, "Q4_K", 256, 144},   {13, "Q5_K", 256, 176},
    {14, "Q6_K", 256, 210},   {15, "Q8_K", 256, 292},   {16, "IQ2_XXS", 256, 66}, {17, "IQ2_XS", 256, 74},
    {18, "IQ3_XXS", 256, 98}, {19, "IQ1_S", 256, 50},   {20, "IQ4_NL", 32, 18},   {21, "IQ3_S", 256, 110},
    {22, "IQ2_S", 256, 82},   {23, "IQ4_XS", 256, 136}, {24, "I8", 1, 1},         {25, "I16", 1, 2},
    {26, "I32", 1, 4},        {27, "I64", 1, 8},        {28, "F64", 1, 8},        {29, "IQ1_M", 256, 56},
    {30, "BF16", 1, 2},       {34, "TQ1_0", 256, 54},   {35, "TQ2_0", 256, 66},   {39, "MXFP4", 32, 17},
};

constexpr uint64_t kMaxNameBytes = 65535;  // the specification's limit of a key
constexpr uint32_t kMaxDims = 4;           // GGML_MAX_DIMS

template <typename T>
T Load(const uint8_t* data) {
  T value;
  std::memcpy(&value, data, sizeof(T));
  return value;
}

// Text of a file may hold anything: control characters and broken UTF-8 are shown as escapes, long texts are cut.
std::string Printable(std::string_view text) {
  std::string out;
  for (const char c : text.substr(0, 80)) {
    const auto byte = static_cast<uint8_t>(c);
    if (byte >= 0x20 && byte < 0x7f) {
      out += c;
    } else {
      out += fmt::format("\\x{:02x}", byte);
    }
  }
  if (text.size() > 80) out += "...";
  return out;
}

}  // namespace

const GgmlTypeInfo* FindGgmlType(uint32_t type) {
  for (const GgmlTypeInfo& info : kTypes) {
    if (info.type == type) return &info;
  }
  return nullptr;
}

const char* GgufFile::NameOf(Type type) {
  constexpr const char* kNames[] = {"uint8", "int8",   "uint16", "int16",  "uint32", "int32",  "float32",
                                    "bool",  "string", "array",  "uint64", "int64",  "float64"};
  return kNames[static_cast<size_t>(type)];
}

// Bytes of a value of fixed size, 0 for the others.
size_t GgufFile::WidthOf(Type type) {
  constexpr size_t kWidths[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
  return kWidths[static_cast<size_t>(type)];
}

// A cursor over the header. Every read is checked against the end of the file.
class GgufFile::Parser {
 public:
  explicit Parser(GgufFile& file) : file_(file), at_(file.map_.data()), end_(at_ + file.map_.size()) {}

  void Run() {
    const uint64_t size = file_.map_.size();
    if (size < 24) Throw("{}: not a GGUF file: {} bytes, a header has 24 at least", file_.path_, size);
    if (std::memcmp(at_, "GGUF", 4) != 0) {
      Throw("{}: not a GGUF file: begins with \"{}\"", file_.path_, Printable({reinterpret_cast<const char*>(at_), 4}));
    }
    at_ += 4;
    file_.version_ = Read<uint32_t>("the version");
    if (file_.version_ != 2 && file_.version_ != 3) {
      const bool swapped = (file_.version_ & 0xffffu) == 0 && file_.version_ != 0;
      Throw("{}: GGUF version {}{}; versions 2 and 3 are read", file_.path_, file_.version_,
            swapped ? " (a big-endian file?)" : "");
    }
    const auto tensor_count = Read<uint64_t>("the number of tensors");
    const auto key_count = Read<uint64_t>("the number of keys");
    // The least that one can take: a tensor 8 + 4 + 8 + 4 + 8 bytes, a key 8 + 4 + 1.
    CheckCount("tensors", tensor_count, 32);
    CheckCount("keys", key_count, 13);
    for (uint64_t i = 0; i < key_count; ++i) ReadKey(i, key_count);
    ReadAlignment();
    for (uint64_t i = 0; i < tensor_count; ++i) ReadTensorInfo(i, tensor_count);
    PlaceTensors();
  }

 private:
  uint64_t Position() const { return static_cast<uint64_t>(at_ - file_.map_.data()); }
  uint64_t Left() const { return static_cast<uint64_t>(end_ - at_); }

  void Need(uint64_t bytes, std::string_view what) const {
    if (bytes > Left()) {
      Throw("{}: the file ends within {}: {} bytes wanted at offset {}, the file has {}", file_.path_, what, bytes,
            Position(), file_.map_.size());
    }
  }

  template <typename T>
  T Read(std::string_view what) {
    Need(sizeof(T), what);
    const T value = Load<T>(at_);
    at_ += sizeof(T);
    return value;
  }

  void CheckCount(const char* what, uint64_t count, uint64_t least_bytes) const {
    if (count > Left() / least_bytes) {
      Throw("{}: {} {} cannot fit into the {} bytes left of the file", file_.path_, count, what, Left());
    }
  }

  std::string ReadName(std::string_view what) {
    const auto length = Read<uint64_t>(what);
    if (length > kMaxNameBytes) {
      Throw("{}: {} at offset {} is {} bytes long, {} is the limit", file_.path_, what, Position() - 8, length,
            kMaxNameBytes);
    }
    Need(length, what);
    std::string name(reinterpret_cast<const char*>(at_), length);
    if (!IsValidUtf8(name)) Throw("{}: {} \"{}\" is not UTF-8", file_.path_, what, Printable(name));
    at_ += length;
    return name;
  }

  Type ReadType(const std::string& key, const char* of) {
    const auto type = Read<uint32_t>(key);
    if (type > static_cast<uint32_t>(Type::kF64)) {
      Throw("{}: key \"{}\": unknown {} type {}", file_.path_, Printable(key), of, type);
    }
    return static_cast<Type>(type);
  }

  void SkipString(const std::string& key) {
    const auto length = Read<uint64_t>(key);
    if (length > Left()) {
      Throw("{}: key \"{}\": a string of {} bytes at offset {} exceeds the file", file_.path_, Printable(key), length,
            Position() - 8);
    }
    at_ += length;
  }

  void ReadKey(uint64_t index, uint64_t count) {
    const std::string key = ReadName(fmt::format("key {} of {}", index + 1, count));
    if (key.empty()) Throw("{}: key {} of {} has no name", file_.path_, index + 1, count);
    Value value{ReadType(key, "value"), false, 1, nullptr};
    if (value.type == Type::kArray) {
      value.array = true;
      value.type = ReadType(key, "element");
      if (value.type == Type::kArray) {
        Throw("{}: key \"{}\": arrays of arrays are not supported", file_.path_, Printable(key));
      }
      value.count = Read<uint64_t>(key);
      const size_t width = value.type == Type::kString ? 8 : WidthOf(value.type);
      if (value.count > Left() / width) {
        Throw("{}: key \"{}\": {} elements of type {} exceed the file", file_.path_, Printable(key), value.count,
              NameOf(value.type));
      }
    }
    value.data = at_;
    if (value.type == Type::kString) {
      for (uint64_t i = 0; i < value.count; ++i) SkipString(key);
    } else {
      Need(value.count * WidthOf(value.type), key);  // cannot overflow: the count was checked
      at_ += value.count * WidthOf(value.type);
    }
    if (!file_.values_.emplace(key, value).second) {
      Throw("{}: key \"{}\" occurs twice", file_.path_, Printable(key));
    }
    file_.keys_.push_back(key);
  }

  void ReadAlignment() {
    const auto alignment = file_.GetU64("general.alignment");
    if (!alignment) return;
    if (*alignment == 0 || (*alignment & (*alignment - 1)) != 0 || *alignment > (uint64_t{1} << 30)) {
      Throw("{}: general.alignment {}: must be a power of two up to 2^30", file_.path_, *alignment);
    }
    file_.alignment_ = *alignment;
  }

  void ReadTensorInfo(uint64_t index, uint64_t count) {
    GgufTensorInfo tensor;
    tensor.name = ReadName(fmt::format("the name of tensor {} of {}", index + 1, count));
    const std::string shown = Printable(tensor.name);
    const auto rank = Read<uint32_t>(shown);
    if (rank == 0 || rank > kMaxDims) {
      Throw("{}: tensor \"{}\" has {} dimensions, 1 to {} are possible", file_.path_, shown, rank, kMaxDims);
    }
    tensor.elements = 1;
    for (uint32_t d = 0; d < rank; ++d) {
      const auto size = Read<uint64_t>(shown);
      if (size == 0) Throw("{}: tensor \"{}\": dimension {} is 0", file_.path_, shown, d);
      if (__builtin_mul_overflow(tensor.elements, size, &tensor.elements) ||
          tensor.elements > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
        Throw("{}: tensor \"{}\": its dimensions overflow (dimension {} is {})", file_.path_, shown, d, size);
      }
      tensor.dims.push_back(size);
    }
    const auto type = Read<uint32_t>(shown);
    const GgmlTypeInfo* info = FindGgmlType(type);
    if (info == nullptr) Throw("{}: tensor \"{}\": unknown type {}", file_.path_, shown, type);
    tensor.type = *info;
    if (tensor.dims[0] % info->block_elements != 0) {
      Throw("{}: tensor \"{}\": rows of {} elements do not divide into {} blocks of {}", file_.path_, shown,
            tensor.dims[0], info->name, info->block_elements);
    }
    if (__builtin_mul_overflow(tensor.elements / info->block_elements, uint64_t{info->block_bytes}, &tensor.bytes)) {
      Throw("{}: tensor \"{}\": its size of {} elements overflows", file_.path_, shown, tensor.elements);
    }
    const auto offset = Read<uint64_t>(shown);
    if (offset % file_.alignment_ != 0) {
      Throw("{}: tensor \"{}\": offset {} is not a multiple of the alignment {}", file_.path_, shown, offset,
            file_.alignment_);
    }
    if (!file_.tensor_index_.emplace(tensor.name, file_.tensors_.size()).second) {
      Throw("{}: tensor \"{}\" occurs twice", file_.path_, shown);
    }
    offsets_.push_back(offset);
    file_.tensors_.push_back(std::move(tensor));
  }

  void PlaceTensors() {
    const uint64_t size = file_.map_.size();
    const uint64_t mask = file_.alignment_ - 1;
    file_.data_offset_ = (Position() + mask) & ~mask;  // both are far below 2^63
    for (size_t i = 0; i < file_.tensors_.size(); ++i) {
      GgufTensorInfo& tensor = file_.tensors_[i];
      const uint64_t room = size > file_.data_offset_ ? size - file_.data_offset_ : 0;
      if (offsets_[i] > room || tensor.bytes > room - offsets_[i]) {
        Throw("{}: tensor \"{}\": {} bytes at offset {} of the data exceed the file, which has {} bytes of data",
              file_.path_, Printable(tensor.name), tensor.bytes, offsets_[i], room);
      }
      tensor.data = file_.map_.data() + file_.data_offset_ + offsets_[i];
    }
  }

  GgufFile& file_;
  const uint8_t* at_;
  const uint8_t* end_;
  std::vector<uint64_t> offsets_;
};

GgufFile GgufFile::Open(const std::string& path) {
  GgufFile file;
  file.path_ = path;
  file.map_ = MappedFile(path);
  Parser(file).Run();
  return file;
}

const GgufTensorInfo* GgufFile::FindTensor(std::string_view name) const {
  const auto it = tensor_index_.find(std::string(name));
  return it == tensor_index_.end() ? nullptr : &tensors_[it->second];
}

const GgufFile::Value* GgufFile::Find(std::string_view key) const {
  const auto it = values_.find(std::string(key));
  return it == values_.end() ? nullptr : &it->second;
}

const GgufFile::Value* GgufFile::FindScalar(std::string_view key, const char* wanted) const {
  const Value* value = Find(key);
  if (value != nullptr && value->array) WrongType(key, *value, wanted);
  return value;
}

const GgufFile::Value* GgufFile::FindArray(std::string_view key, const char* wanted) const {
  const Value* value = Find(key);
  if (value != nullptr && !value->array) WrongType(key, *value, wanted);
  return value;
}

void GgufFile::WrongType(std::string_view key, const Value& value, const char* wanted) const {
  Throw("{}: key \"{}\" is {}{}, wanted is {}", path_, Printable(key), value.array ? "an array of " : "of type ",
        NameOf(value.type), wanted);
}

void GgufFile::Missing(std::string_view key) const { Throw("{}: key \"{}\" is missing", path_, Printable(key)); }

bool GgufFile::IsArray(std::string_view key) const {
  const Value* value = Find(key);
  return value != nullptr && value->array;
}

bool GgufFile::IsInteger(Type type) {
  return type != Type::kF32 && type != Type::kF64 && type != Type::kBool && type != Type::kString &&
         type != Type::kArray;
}

bool GgufFile::IntegerFits(Type type, const uint8_t* data) {
  return type != Type::kU64 || Load<uint64_t>(data) <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
}

int64_t GgufFile::IntegerAt(Type type, const uint8_t* data) {
  switch (type) {
    case Type::kU8:
    case Type::kBool:
      return Load<uint8_t>(data);
    case Type::kI8:
      return Load<int8_t>(data);
    case Type::kU16:
      return Load<uint16_t>(data);
    case Type::kI16:
      return Load<int16_t>(data);
    case Type::kU32:
      return Load<uint32_t>(data);
    case Type::kI32:
      return Load<int32_t>(data);
    default:
      return Load<int64_t>(data);
  }
}

std::string_view GgufFile::StringAt(std::string_view key, const uint8_t*& position) const {
  const auto length = Load<uint64_t>(position);
  const std::string_view text(reinterpret_cast<const char*>(position + 8), length);
  if (!IsValidUtf8(text)) Throw("{}: key \"{}\": \"{}\" is not UTF-8", path_, Printable(key), Printable(text));
  position += 8 + length;
  return text;
}

std::optional<std::string_view> GgufFile::GetString(std::string_view key) const {
  const Value* value = FindScalar(key, "a string");
  if (value == nullptr) return std::nullopt;
  if (value->type != Type::kString) WrongType(key, *value, "a string");
  const uint8_t* position = value->data;
  return StringAt(key, position);
}

std::optional<int64_t> GgufFile::GetI64(std::string_view key) const {
  const Value* value = FindScalar(key, "an integer");
  if (value == nullptr) return std::nullopt;
  if (!IsInteger(value->type)) WrongType(key, *value, "an integer");
  if (!IntegerFits(value->type, value->data)) {
    Throw("{}: key \"{}\": {} is beyond 2^63 - 1", path_, Printable(key), Load<uint64_t>(value->data));
  }
  return IntegerAt(value->type, value->data);
}

std::optional<uint64_t> GgufFile::GetU64(std::string_view key) const {
  const Value* value = FindScalar(key, "an unsigned integer");
  if (value == nullptr) return std::nullopt;
  if (!IsInteger(value->type)) WrongType(key, *value, "an unsigned integer");
  if (value->type == Type::kU64) return Load<uint64_t>(value->data);
  const int64_t integer = IntegerAt(value->type, value->data);
  if (integer < 0) Throw("{}: key \"{}\": {} must not be negative", path_, Printable(key), integer);
  return static_cast<uint64_t>(integer);
}

std::optional<double> GgufFile::GetF64(std::string_view key) const {
  const Value* value = FindScalar(key, "a number");
  if (value == nullptr) return std::nullopt;
  if (value->type == Type::kF32) return Load<float>(value->data);
  if (value->type == Type::kF64) return Load<double>(value->data);
  if (!IsInteger(value->type)) WrongType(key, *value, "a number");
  if (value->type == Type::kU64) return static_cast<double>(Load<uint64_t>(value->data));
  return static_cast<double>(IntegerAt(value->type, value->data));
}

std::optional<bool> GgufFile::GetBool(std::string_view key) const {
  const Value* value = FindScalar(key, "a boolean");
  if (value == nullptr) return std::nullopt;
  if (value->type != Type::kBool) WrongType(key, *value, "a boolean");
  const uint8_t byte = *value->data;
  if (byte > 1) Throw("{}: key \"{}\": a boolean is 0 or 1, this is {}", path_, Printable(key), byte);
  return byte == 1;
}

std::optional<std::vector<std::string_view>> GgufFile::GetStringArray(std::string_view key) const {
  const Value* value = FindArray(key, "an array of strings");
  if (value == nullptr) return std::nullopt;
  if (value->type != Type::kString) WrongType(key, *value, "an array of strings");
  std::vector<std::string_view> out;
  out.reserve(value->count);
  const uint8_t* position = value->data;
  for (uint64_t i = 0; i < value->count; ++i) out.push_back(StringAt(key, position));
  return out;
}

std::optional<std::vector<int64_t>> GgufFile::GetI64Array(std::string_view key) const {
  const Value* value = FindArray(key, "an array of integers");
  if (value == nullptr) return std::nullopt;
  if (!IsInteger(value->type) && value->type != Type::kBool) WrongType(key, *value, "an array of integers");
  std::vector<int64_t> out(value->count);
  for (uint64_t i = 0; i < value->count; ++i) {
    const uint8_t* element = value->data + i * WidthOf(value->type);
    if (!IntegerFits(value->type, element)) {
      Throw("{}: key \"{}\": element {} is beyond 2^63 - 1", path_, Printable(key), i);
    }
    out[i] = IntegerAt(value->type, element);
  }
  return out;
}

std::optional<std::vector<float>> GgufFile::GetF32Array(std::string_view key) const {
  const Value* value = FindArray(key, "an array of floats");
  if (value == nullptr) return std::nullopt;
  std::vector<float> out(value->count);
  if (value->type == Type::kF32) {
    if (!out.empty()) std::memcpy(out.data(), value->data, out.size() * sizeof(float));
  } else if (value->type == Type::kF64) {
    for (uint64_t i = 0; i < value->count; ++i) out[i] = static_cast<float>(Load<double>(value->data + 8 * i));
  } else {
    WrongType(key, *value, "an array of floats");
  }
  return out;
}

std::string_view GgufFile::RequireString(std::string_view key) const {
  const auto value = GetString(key);
  if (!value) Missing(key);
  return *value;
}

uint64_t GgufFile::RequireU64(std::string_view key) const {
  const auto value = GetU64(key);
  if (!value) Missing(key);
  return *value;
}

double GgufFile::RequireF64(std::string_view key) const {
  const auto value = GetF64(key);
  if (!value) Missing(key);
  return *value;
}

}  // namespace weft
