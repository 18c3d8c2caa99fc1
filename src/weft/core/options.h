#pragma once
// Options declared once: name, type, default, help and check. From the declarations come the command-line flags (vLLM's
// spelling), the keys of the YAML config file, the help text, the page docs/options.md and the error texts.
//
// CLI11 is not used here: its short options are one character long (-tp would be read as -t -p), it has no dotted keys
// of a JSON option, and flags spelt with - and _ alike, a file of the same names and refusals with a rule would all
// have to be laid around it.

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "weft/core/error.h"

namespace weft {

// Where an option's value goes. Its content when it is declared is the default.
// An optional without value prints as "none" in the help: the help text then says what happens.
using OptionTarget =
    std::variant<bool*, int32_t*, int64_t*, double*, std::string*, std::vector<std::string>*, nlohmann::json*,
                 std::optional<bool>*, std::optional<int64_t>*, std::optional<double>*, std::optional<std::string>*>;

class Option {
 public:
  Option(std::string name, OptionTarget target, std::string help, std::string group);

  // Another spelling: "-tp", "--kv-cache-memory-bytes".
  Option& Alias(std::string spelling);
  // Only values in [low, high] are taken.
  Option& Range(double low, double high = std::numeric_limits<double>::infinity());
  Option& Choices(std::vector<std::string> choices);
  // Called with the new value in place; returns the rule that it breaks, or "".
  Option& Check(std::function<std::string()> check);
  // Integers may be written 4k (4000), 4K (4096), 1.5g (lower case decimal, upper case binary), as in vLLM.
  Option& HumanReadable();
  // The option exists for scripts written for vLLM; any value but the default is refused with this reason.
  Option& Refused(std::string reason);
  // The option is taken and changes nothing, for this reason.
  Option& Unused(std::string reason);
  // How the help shows the value: --port PORT.
  Option& Metavar(std::string metavar);
  // How the help shows the default, where the value itself says little ("the model's").
  Option& DefaultText(std::string text);

  const std::string& name() const { return name_; }
  const std::string& group() const { return group_; }
  const std::vector<std::string>& aliases() const { return aliases_; }
  bool IsBool() const;
  bool IsList() const;
  bool IsJson() const;
  bool is_set() const { return is_set_; }

 private:
  friend class OptionSet;

  // `where` is the spelling that the user wrote ("--port" or "serve.yaml:3: port").
  void SetText(const std::string& where, const std::string& text);
  void SetList(const std::string& where, std::vector<std::string> words);
  void SetJson(const std::string& where, nlohmann::json value);
  // --name.a.b VALUE: one member of a JSON option; `append`: --name.a.b+ VALUE adds to an array.
  void SetMember(const std::string& where, const std::vector<std::string>& path, bool append, const std::string& text);
  void Verify(const std::string& where, const std::string& shown);
  void RefuseIfChanged() const;  // after the last source
  [[noreturn]] void Refuse(const std::string& where, const std::string& shown, const std::string& rule) const;
  std::string Print() const;  // the value as text
  std::string TypeText() const;
  std::string RuleText() const;

  std::string name_;
  OptionTarget target_;
  std::string help_;
  std::string group_;
  std::string default_;
  std::string default_text_;
  std::string metavar_;
  std::vector<std::string> aliases_;
  std::vector<std::string> choices_;
  double low_ = -std::numeric_limits<double>::infinity();
  double high_ = std::numeric_limits<double>::infinity();
  std::function<std::string()> check_;
  bool human_ = false;
  std::string refused_;
  std::string unused_;
  bool is_set_ = false;
  std::string where_;  // who set it last
};

// The options of one command.
class OptionSet {
 public:
  // `command`: "weft serve". `positional`: the name of its one argument: "MODEL", "[MODEL]" where it may be left
  // out, empty for none.
  OptionSet(std::string command, std::string about, std::string positional = {}, std::string* argument = nullptr);

  // Options declared from here on belong to this group of the help.
  void Group(std::string name) { group_ = std::move(name); }
  // `name`: with hyphens, without the leading ones.
  Option& Add(std::string name, OptionTarget target, std::string help);

  enum class Action { kRun, kHelp, kHelpMarkdown };

  // Reads the arguments after the command's name, and the file of --config where it is among them (the command line
  // wins). Throws weft::Error naming flag, value and rule; its param() is the flag.
  Action Parse(const std::vector<std::string>& args);

  // nullptr when there is none. `name` as Add had it.
  const Option* Find(std::string_view name) const;
  bool IsSet(std::string_view name) const;

  std::string Help() const;
  std::string Markdown() const;
  const std::string& command() const { return command_; }

 private:
  void ReadYaml(const std::string& path);
  Option* Lookup(std::string_view spelling) const;  // "--max-model-len", "-tp": normalised already
  [[noreturn]] void Unknown(const std::string& shown, std::string_view spelling) const;
  std::string Suggestion(std::string_view spelling) const;

  std::string command_;
  std::string about_;
  std::string positional_;
  std::string* argument_;
  std::string group_ = "General";
  std::string config_file_;
  std::vector<std::unique_ptr<Option>> options_;
};

// "--Max_Model_Len" and "--max-model-len" are the same flag: how it is looked up.
std::string NormalisedFlag(std::string_view spelling);

// "4096", "4k", "4K", "1.5g" -> integer; nothing when it is none of these or does not fit.
std::optional<int64_t> ParseHumanInt(std::string_view text);

}  // namespace weft
