#include "weft/api/json_fields.h"

#include <array>
#include <cmath>

namespace weft {
namespace {

constexpr int kMaxDepth = 100;

constexpr int kMaxKeys = 1024;

// What is wrong with the shape of the text, before it is parsed; empty when nothing is. Counts brackets and colons
// outside strings. The text may not be JSON at all; the parser judges that later.
std::string ShapeFault(std::string_view text) {
  int depth = 0;
  std::array<int, kMaxDepth + 1> keys{};
  for (size_t i = 0; i < text.size(); ++i) {
    switch (text[i]) {
      case '"':
        for (++i; i < text.size() && text[i] != '"'; ++i) {
          if (text[i] == '\\') ++i;
        }
        break;
      case '[':
      case '{':
        if (++depth > kMaxDepth) return fmt::format("The request body is nested more than {} levels deep.", kMaxDepth);
        keys[depth] = 0;
        break;
      case ']':
      case '}':
        if (--depth < 0) return "The request body is not valid JSON: a closing bracket without an opening one.";
        break;
      case ':':
        if (++keys[depth] > kMaxKeys) {
          return fmt::format("The request body has an object with more than {} keys.", kMaxKeys);
        }
        break;
      default:
        break;
    }
  }
  return {};
}

}  // namespace

Result<Json> ParseJsonObject(std::string_view text) {
  if (const std::string fault = ShapeFault(text); !fault.empty()) return Fail("{}", fault);
  Json json;
  try {
    json = Json::parse(text.begin(), text.end());
  } catch (const Json::exception& e) {
    // The library's texts begin with "[json.exception.parse_error.101] "; what follows says where and what. They quote
    // the offending bytes, which need not be UTF-8: the error object replaces those when it is written.
    std::string what = e.what();
    if (const size_t end = what.find("] "); end != std::string::npos) what.erase(0, end + 2);
    return Fail("The request body is not valid JSON: {}", what);
  }
  if (!json.is_object()) return Fail("The request body must be a JSON object, got {}.", json.type_name());
  return json;
}

std::string ShortDump(const Json& value) {
  // Never dump a whole prompt to show that it was no number.
  if (value.is_structured() && value.size() > 8)
    return std::string(value.type_name()) + " of " + std::to_string(value.size());
  std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  constexpr size_t kMax = 80;
  if (text.size() > kMax) text = text.substr(0, kMax) + "...";
  return text;
}

std::optional<int64_t> IntegerOf(const Json& value) {
  if (value.is_number_unsigned()) {
    const uint64_t u = value.get<uint64_t>();
    if (u > static_cast<uint64_t>(INT64_MAX)) return std::nullopt;
    return static_cast<int64_t>(u);
  }
  if (value.is_number_integer()) return value.get<int64_t>();
  if (value.is_number_float()) {
    const double d = value.get<double>();
    // 2^53: above, a double no longer says which integer was meant.
    if (std::trunc(d) == d && std::abs(d) <= 9007199254740992.0) return static_cast<int64_t>(d);
  }
  return std::nullopt;
}

const Json* FieldReader::Get(const std::string& name) {
  known_.insert(name);
  const auto it = object_.find(name);
  if (it == object_.end() || it->is_null()) return nullptr;
  return &*it;
}

void FieldReader::Fail(const std::string& name, std::string message) {
  if (!error_) error_.emplace(std::move(message), ErrorKind::kInvalidArgument, prefix_ + name);
}

void FieldReader::WrongType(const std::string& name, const char* expected) {
  Fail(name, fmt::format("`{}{}` must be {}, got {}", prefix_, name, expected, ShortDump(object_.at(name))));
}

std::optional<bool> FieldReader::Bool(const std::string& name) {
  const Json* value = Get(name);
  if (value == nullptr) return std::nullopt;
  if (!value->is_boolean()) {
    WrongType(name, "true or false");
    return std::nullopt;
  }
  return value->get<bool>();
}

std::optional<int64_t> FieldReader::Int(const std::string& name, int64_t min, int64_t max) {
  const Json* value = Get(name);
  if (value == nullptr) return std::nullopt;
  const std::optional<int64_t> integer = IntegerOf(*value);
  if (!integer) {
    WrongType(name, "an integer");
    return std::nullopt;
  }
  if (*integer < min || *integer > max) {
    if (max == INT32_MAX || max == INT64_MAX) {
      Fail(name, fmt::format("`{}{}` must be at least {}{}, got {}", prefix_, name, min,
                             *integer > max ? fmt::format(" and at most {}", max) : "", *integer));
    } else {
      Fail(name, fmt::format("`{}{}` must be between {} and {}, got {}", prefix_, name, min, max, *integer));
    }
    return std::nullopt;
  }
  return integer;
}

std::optional<float> FieldReader::FiniteFloat(const std::string& name) {
  const Json* value = Get(name);
  if (value == nullptr) return std::nullopt;
  if (!value->is_number()) {
    WrongType(name, "a number");
    return std::nullopt;
  }
  const float number = static_cast<float>(value->get<double>());
  if (!std::isfinite(number)) {
    WrongType(name, "a finite number");
    return std::nullopt;
  }
  return number;
}

std::optional<std::string> FieldReader::String(const std::string& name) {
  const Json* value = Get(name);
  if (value == nullptr) return std::nullopt;
  if (!value->is_string()) {
    WrongType(name, "a string");
    return std::nullopt;
  }
  return value->get<std::string>();
}

std::optional<std::vector<std::string>> FieldReader::Strings(const std::string& name, size_t max_count) {
  const Json* value = Array(name);
  if (value == nullptr) return std::nullopt;
  if (value->size() > max_count) {
    Fail(name, fmt::format("`{}{}` has {} entries, the most allowed is {}", prefix_, name, value->size(), max_count));
    return std::nullopt;
  }
  std::vector<std::string> strings;
  strings.reserve(value->size());
  for (const Json& entry : *value) {
    if (!entry.is_string()) {
      Fail(name, fmt::format("`{}{}` must hold strings only, got {}", prefix_, name, ShortDump(entry)));
      return std::nullopt;
    }
    strings.push_back(entry.get<std::string>());
  }
  return strings;
}

std::optional<std::vector<int32_t>> FieldReader::TokenIds(const std::string& name, int64_t vocab_size,
                                                          size_t max_count) {
  const Json* value = Array(name);
  if (value == nullptr) return std::nullopt;
  if (value->size() > max_count) {
    Fail(name, fmt::format("`{}{}` has {} entries, the most allowed is {}", prefix_, name, value->size(), max_count));
    return std::nullopt;
  }
  std::vector<int32_t> ids;
  ids.reserve(value->size());
  for (const Json& entry : *value) {
    const std::optional<int64_t> id = entry.is_number_integer() ? IntegerOf(entry) : std::nullopt;
    if (!id || *id < 0 || *id >= vocab_size) {
      Fail(name, fmt::format("`{}{}` must hold token ids between 0 and {}, got {}", prefix_, name, vocab_size - 1,
                             ShortDump(entry)));
      return std::nullopt;
    }
    ids.push_back(static_cast<int32_t>(*id));
  }
  return ids;
}

const Json* FieldReader::Object(const std::string& name) {
  const Json* value = Get(name);
  if (value != nullptr && !value->is_object()) {
    WrongType(name, "an object");
    return nullptr;
  }
  return value;
}

const Json* FieldReader::Array(const std::string& name) {
  const Json* value = Get(name);
  if (value != nullptr && !value->is_array()) {
    WrongType(name, "an array");
    return nullptr;
  }
  return value;
}

void FieldReader::Ignore(std::initializer_list<const char*> names) {
  for (const char* name : names) known_.insert(name);
}

void FieldReader::Refuse(std::initializer_list<const char*> names) {
  for (const char* name : names) {
    const Json* value = Get(name);
    if (value == nullptr || *value == false || (value->is_array() && value->empty())) continue;
    Fail(name, fmt::format("`{}{}` is not supported yet", prefix_, name));
  }
}

std::vector<std::string> FieldReader::Unknown() const {
  std::vector<std::string> names;
  for (const auto& item : object_.items()) {
    if (!known_.contains(item.key())) names.push_back(item.key());
  }
  return names;
}

}  // namespace weft
