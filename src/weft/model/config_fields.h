#pragma once
// Reading the fields of a config.json with checks; shared by the files that parse it.

#include <cmath>
#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "weft/core/error.h"
#include "weft/model/config.h"

namespace weft::internal {

using Json = nlohmann::json;

// Bounds that no model comes near; they keep every product of two sizes inside 64 bits.
constexpr int64_t kMaxWidth = int64_t{1} << 24;
constexpr int64_t kMaxVocab = int64_t{1} << 28;
constexpr int64_t kMaxLayers = 1 << 16;
constexpr int64_t kMaxHeads = 1 << 16;
constexpr int64_t kMaxHeadDim = 1 << 14;
constexpr int64_t kMaxPositions = std::numeric_limits<int32_t>::max();

// An error's copy of a value: long ones are cut.
inline std::string Show(const Json& value) {
  std::string text = value.dump(-1, ' ', false, Json::error_handler_t::replace);
  if (text.size() > 80) text = text.substr(0, 77) + "...";
  return text;
}

// The fields of one JSON object. `where` is put before their names in errors ("rope_scaling.").
class Fields {
 public:
  Fields(const Json& object, std::string where) : object_(object), where_(std::move(where)) {}

  // Null where the field is absent or null.
  const Json* Find(const char* name) const {
    const auto it = object_.find(name);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }
  bool Present(const char* name) const { return object_.contains(name); }

  [[noreturn]] void Refuse(const char* name, const Json& value, std::string_view rule) const {
    throw Error(fmt::format("model config: {}{} = {}: {}", where_, name, Show(value), rule),
                ErrorKind::kInvalidArgument, where_ + name);
  }
  [[noreturn]] void Missing(const char* name) const {
    throw Error(fmt::format("model config: {}{} is missing", where_, name), ErrorKind::kInvalidArgument, where_ + name);
  }

  int64_t Int(const char* name, int64_t min, int64_t max, std::optional<int64_t> absent = {}) const {
    const Json* value = Find(name);
    if (value == nullptr) {
      if (!absent) Missing(name);
      return *absent;
    }
    return ToInt(name, *value, min, max);
  }

  int64_t ToInt(const char* name, const Json& value, int64_t min, int64_t max) const {
    bool fits = value.is_number_integer();
    if (fits && value.is_number_unsigned()) {
      fits = value.get<uint64_t>() <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
    }
    const int64_t number = fits ? value.get<int64_t>() : 0;
    if (!fits || number < min || number > max) {
      Refuse(name, value, fmt::format("must be an integer from {} to {}", min, max));
    }
    return number;
  }

  // A finite number in [min, max].
  double Number(const char* name, double min, double max, std::optional<double> absent = {}) const {
    const Json* value = Find(name);
    if (value == nullptr) {
      if (!absent) Missing(name);
      return *absent;
    }
    const double number = value->is_number() ? value->get<double>() : std::nan("");
    if (!(number >= min && number <= max)) {
      Refuse(name, *value, fmt::format("must be a number from {} to {}", min, max));
    }
    return number;
  }

  bool Bool(const char* name, bool absent) const {
    const Json* value = Find(name);
    if (value == nullptr) return absent;
    if (!value->is_boolean()) Refuse(name, *value, "must be true or false");
    return value->get<bool>();
  }

  std::string String(const char* name, const std::string& absent) const {
    const Json* value = Find(name);
    if (value == nullptr) return absent;
    if (!value->is_string()) Refuse(name, *value, "must be a string");
    return value->get<std::string>();
  }

 private:
  const Json& object_;
  std::string where_;
};

// Throws weft::Error. `partial_rotary_factor` is 1 where the config has none.
RopeConfig ParseRope(const Fields& config, int64_t max_positions, double* partial_rotary_factor);

// Multi-head latent attention: `mla`, the head sizes and the rope of DeepSeek. num_heads must be set.
void ParseLatentAttention(const Fields& fields, ModelConfig& config);

// `moe` and `moe_layers`, by the rules of the model's family. num_layers must be set.
void ParseExperts(const Fields& fields, ModelConfig& config);

}  // namespace weft::internal
