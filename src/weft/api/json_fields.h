#pragma once
// Strict, typed reading of the fields of a JSON object that came from outside.

#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "weft/core/error.h"

namespace weft {

// Keeps the order of keys: chat templates print tools and messages as the client wrote them.
using Json = nlohmann::ordered_json;

// Parses a JSON text that must be an object. kInvalidArgument when it is not valid JSON, not valid UTF-8, nested more
// than 100 deep (writing a document out again recurses) or has an object of more than 1024 keys (looking up a key of an
// ordered object is linear).
Result<Json> ParseJsonObject(std::string_view text);

// Reads one field after another, strictly: a string is not a number, a number is not a boolean, null counts as absent.
// A wrong type or a value out of range makes an Error that names the field; the first one is kept, and reading goes on
// harmlessly, so that callers check once at the end.
class FieldReader {
 public:
  // `prefix` stands before field names in errors ("stream_options.").
  explicit FieldReader(const Json& object, std::string prefix = {}) : object_(object), prefix_(std::move(prefix)) {}

  // The field, or nullptr when it is absent or null.
  const Json* Get(const std::string& name);

  std::optional<bool> Bool(const std::string& name);
  // An integer in [min, max]. 3.0 counts as one, 3.5 does not.
  std::optional<int64_t> Int(const std::string& name, int64_t min, int64_t max);
  // A number that is finite as a float. `what` says the rule ("at least 0"), `ok` checks it.
  template <typename Check>
  std::optional<float> Number(const std::string& name, const char* what, Check&& ok) {
    std::optional<float> value = FiniteFloat(name);
    if (value && !ok(*value)) {
      Fail(name, "`" + prefix_ + name + "` must be " + what + ", got " + object_.at(name).dump());
      return std::nullopt;
    }
    return value;
  }
  std::optional<std::string> String(const std::string& name);
  std::optional<std::vector<std::string>> Strings(const std::string& name, size_t max_count);
  // Token ids in [0, vocab_size).
  std::optional<std::vector<int32_t>> TokenIds(const std::string& name, int64_t vocab_size, size_t max_count);
  const Json* Object(const std::string& name);
  const Json* Array(const std::string& name);

  // Known fields whose values have no effect here.
  void Ignore(std::initializer_list<const char*> names);
  // Fields that change what is generated and that this server cannot do: an error if one is there, because ignoring
  // it would give wrong output with status 200. null, false and empty lists count as absent.
  void Refuse(std::initializer_list<const char*> names);

  void Fail(const std::string& name, std::string message);
  bool ok() const { return !error_.has_value(); }
  tl::unexpected<Error> error() const { return tl::make_unexpected(*error_); }

  // The fields of the object that nobody asked for.
  std::vector<std::string> Unknown() const;

 private:
  std::optional<float> FiniteFloat(const std::string& name);
  void WrongType(const std::string& name, const char* expected);

  const Json& object_;
  std::string prefix_;
  std::set<std::string> known_;
  std::optional<Error> error_;
};

// "[1, 2, ..." cut to a length that fits into an error message.
std::string ShortDump(const Json& value);

// Appends a member without looking whether the key is there already (that is linear): the caller knows that it is not.
inline void AppendMember(Json& object, std::string key, Json value) {
  static_cast<Json::object_t::Container&>(object.get_ref<Json::object_t&>())
      .emplace_back(std::move(key), std::move(value));
}

// The integer in `value` when there is one: a JSON integer or a float without a fraction, inside int64.
std::optional<int64_t> IntegerOf(const Json& value);

}  // namespace weft
