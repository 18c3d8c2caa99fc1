#include "weft/core/options.h"

#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <set>

namespace weft {
namespace {

using nlohmann::json;

template <typename... Fs>
struct Overloaded : Fs... {
  using Fs::operator()...;
};

template <typename T>
constexpr bool kIsOptional = false;
template <typename T>
constexpr bool kIsOptional<std::optional<T>> = true;

std::string PrintValue(bool value) { return value ? "true" : "false"; }
std::string PrintValue(int32_t value) { return std::to_string(value); }
std::string PrintValue(int64_t value) { return std::to_string(value); }
std::string PrintValue(double value) { return fmt::format("{}", value); }
std::string PrintValue(const std::string& value) { return value; }
std::string PrintValue(const std::vector<std::string>& value) { return fmt::format("{}", fmt::join(value, " ")); }
std::string PrintValue(const json& value) { return value.is_null() || value.empty() ? "none" : value.dump(); }
template <typename T>
std::string PrintValue(const std::optional<T>& value) {
  return value ? PrintValue(*value) : "none";
}

std::optional<bool> ParseBool(std::string_view text) {
  std::string lower(text);
  std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char c) { return std::tolower(c); });
  if (lower == "true" || lower == "yes" || lower == "on" || lower == "1") return true;
  if (lower == "false" || lower == "no" || lower == "off" || lower == "0") return false;
  return std::nullopt;
}

std::optional<int64_t> ParseInt(std::string_view text) {
  if (!text.empty() && text[0] == '+') text.remove_prefix(1);
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

std::optional<double> ParseDouble(std::string_view text) {
  if (!text.empty() && text[0] == '+') text.remove_prefix(1);
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !std::isfinite(value)) return std::nullopt;
  return value;
}

// JSON where it is JSON, else the text itself: --hf-overrides.rope_scaling.rope_type yarn.
json ParseLoose(const std::string& text) {
  json value = json::parse(text, nullptr, false);
  return value.is_discarded() ? json(text) : value;
}

size_t EditDistance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t above = row[j];
      row[j] = std::min({above + 1, row[j - 1] + 1, diagonal + (a[i - 1] == b[j - 1] ? 0 : 1)});
      diagonal = above;
    }
  }
  return row[b.size()];
}

json ToJson(const YAML::Node& node) {
  switch (node.Type()) {
    case YAML::NodeType::Map: {
      json object = json::object();
      for (const auto& entry : node) object[entry.first.Scalar()] = ToJson(entry.second);
      return object;
    }
    case YAML::NodeType::Sequence: {
      json array = json::array();
      for (const auto& entry : node) array.push_back(ToJson(entry));
      return array;
    }
    case YAML::NodeType::Scalar: {
      const std::string& text = node.Scalar();
      if (node.Tag() == "!") return text;  // quoted
      if (text == "true" || text == "True") return true;
      if (text == "false" || text == "False") return false;
      if (const auto value = ParseInt(text)) return *value;
      if (const auto value = ParseDouble(text)) return *value;
      return text;
    }
    default:
      return nullptr;
  }
}

std::string Shown(const std::string& text) { return text.empty() ? "''" : text; }

// A word that is meant as a flag: -x, --x=y z; not "-", not a negative number, not a text that begins with a dash.
bool LooksLikeFlag(std::string_view word) {
  return word.size() >= 2 && word[0] == '-' && !ParseDouble(word).has_value() &&
         word.substr(0, word.find('=')).find_first_of(" \t\n") == std::string_view::npos;
}

std::string MarkdownCell(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '|') out += '\\';
    out += c;
  }
  return out;
}

}  // namespace

std::string NormalisedFlag(std::string_view spelling) {
  std::string out(spelling);
  std::replace(out.begin(), out.end(), '_', '-');
  return out;
}

std::optional<int64_t> ParseHumanInt(std::string_view text) {
  if (const auto plain = ParseInt(text)) return plain;
  if (text.size() < 2) return std::nullopt;
  static constexpr std::string_view kDecimal = "kmgt", kBinary = "KMGT";
  const char suffix = text.back();
  const std::string_view digits = text.substr(0, text.size() - 1);
  double factor = 1;
  if (const size_t power = kDecimal.find(suffix); power != kDecimal.npos) {
    factor = std::pow(1e3, static_cast<double>(power + 1));
  } else if (const size_t binary = kBinary.find(suffix); binary != kBinary.npos) {
    factor = std::ldexp(1.0, static_cast<int>(10 * (binary + 1)));
  } else {
    return std::nullopt;
  }
  const auto number = ParseDouble(digits);
  if (!number || std::abs(*number * factor) > 9e18) return std::nullopt;
  return static_cast<int64_t>(std::llround(*number * factor));
}

Option::Option(std::string name, OptionTarget target, std::string help, std::string group)
    : name_(std::move(name)), target_(target), help_(std::move(help)), group_(std::move(group)), default_(Print()) {}

Option& Option::Alias(std::string spelling) {
  aliases_.push_back(std::move(spelling));
  return *this;
}
Option& Option::Range(double low, double high) {
  low_ = low;
  high_ = high;
  return *this;
}
Option& Option::Choices(std::vector<std::string> choices) {
  choices_ = std::move(choices);
  return *this;
}
Option& Option::Check(std::function<std::string()> check) {
  check_ = std::move(check);
  return *this;
}
Option& Option::HumanReadable() {
  human_ = true;
  return *this;
}
Option& Option::Refused(std::string reason) {
  refused_ = std::move(reason);
  return *this;
}
Option& Option::Unused(std::string reason) {
  unused_ = std::move(reason);
  return *this;
}
Option& Option::Metavar(std::string metavar) {
  metavar_ = std::move(metavar);
  return *this;
}
Option& Option::DefaultText(std::string text) {
  default_text_ = std::move(text);
  return *this;
}

bool Option::IsBool() const {
  return std::holds_alternative<bool*>(target_) || std::holds_alternative<std::optional<bool>*>(target_);
}
bool Option::IsList() const { return std::holds_alternative<std::vector<std::string>*>(target_); }
bool Option::IsJson() const { return std::holds_alternative<json*>(target_); }

std::string Option::Print() const {
  return std::visit([](const auto* target) { return PrintValue(*target); }, target_);
}

std::string Option::TypeText() const {
  if (!metavar_.empty()) return metavar_;
  if (!choices_.empty()) return fmt::format("{{{}}}", fmt::join(choices_, ","));
  return std::visit(
      Overloaded{[](const bool*) -> std::string { return ""; },
                 [](const std::optional<bool>*) -> std::string { return ""; },
                 [](const int32_t*) -> std::string { return "N"; }, [](const int64_t*) -> std::string { return "N"; },
                 [](const std::optional<int64_t>*) -> std::string { return "N"; },
                 [](const double*) -> std::string { return "X"; },
                 [](const std::optional<double>*) -> std::string { return "X"; },
                 [](const std::string*) -> std::string { return "TEXT"; },
                 [](const std::optional<std::string>*) -> std::string { return "TEXT"; },
                 [](const std::vector<std::string>*) -> std::string { return "TEXT ..."; },
                 [](const json*) -> std::string { return "JSON"; }},
      target_);
}

std::string Option::RuleText() const {
  const bool low = std::isfinite(low_), high = std::isfinite(high_);
  if (low && high) return fmt::format("must be from {} to {}", low_, high_);
  if (low) return fmt::format("must be {} or more", low_);
  if (high) return fmt::format("must be {} or less", high_);
  if (!choices_.empty()) return fmt::format("must be one of: {}", fmt::join(choices_, ", "));
  return "";
}

void Option::Refuse(const std::string& where, const std::string& shown, const std::string& rule) const {
  throw Error(fmt::format("{}{}{}: {}", where, shown.empty() ? "" : " = ", shown, rule), ErrorKind::kInvalidArgument,
              "--" + name_);
}

void Option::SetText(const std::string& where, const std::string& text) {
  const auto integer = [&](int64_t low, int64_t high) {
    const auto value = human_ ? ParseHumanInt(text) : ParseInt(text);
    if (!value || *value < low || *value > high) {
      Refuse(where, Shown(text),
             human_ ? "must be a whole number, which may end in k, m, g, t (thousands) or K, M, G, T (powers of 1024)"
                    : "must be a whole number");
    }
    return *value;
  };
  const auto real = [&] {
    const auto value = ParseDouble(text);
    if (!value) Refuse(where, Shown(text), "must be a number");
    return *value;
  };
  const auto boolean = [&] {
    const auto value = ParseBool(text);
    if (!value) Refuse(where, Shown(text), "must be true or false");
    return *value;
  };
  constexpr int64_t kMin = std::numeric_limits<int64_t>::min(), kMax = std::numeric_limits<int64_t>::max();
  std::visit(
      Overloaded{[&](bool* t) { *t = boolean(); }, [&](std::optional<bool>* t) { *t = boolean(); },
                 [&](int32_t* t) { *t = static_cast<int32_t>(integer(INT32_MIN, INT32_MAX)); },
                 [&](int64_t* t) { *t = integer(kMin, kMax); },
                 [&](std::optional<int64_t>* t) { *t = integer(kMin, kMax); }, [&](double* t) { *t = real(); },
                 [&](std::optional<double>* t) { *t = real(); }, [&](std::string* t) { *t = text; },
                 [&](std::optional<std::string>* t) { *t = text; }, [&](std::vector<std::string>* t) { *t = {text}; },
                 [&](json* t) {
                   json value = json::parse(text, nullptr, false);
                   if (!value.is_object()) Refuse(where, Shown(text), "must be a JSON object");
                   *t = std::move(value);
                 }},
      target_);
  Verify(where, Shown(text));
}

void Option::SetList(const std::string& where, std::vector<std::string> words) {
  const std::string shown = fmt::format("{}", fmt::join(words, " "));
  *std::get<std::vector<std::string>*>(target_) = std::move(words);
  Verify(where, shown);
}

void Option::SetJson(const std::string& where, json value) {
  if (!value.is_object()) Refuse(where, value.dump(), "must be a JSON object");
  const std::string shown = value.dump();
  *std::get<json*>(target_) = std::move(value);
  Verify(where, shown);
}

void Option::SetMember(const std::string& where, const std::vector<std::string>& path, bool append,
                       const std::string& text) {
  json* place = std::get<json*>(target_);
  for (const std::string& key : path) {
    if (key.empty()) Refuse(where, text, "has an empty key between its dots");
    if (!place->is_object()) *place = json::object();
    place = &(*place)[key];
  }
  if (append) {
    if (!place->is_array()) *place = json::array();
    place->push_back(ParseLoose(text));
  } else {
    *place = ParseLoose(text);
  }
  Verify(where, text);
}

void Option::Verify(const std::string& where, const std::string& shown) {
  const auto in_range = [&](double value) { return value >= low_ && value <= high_; };
  const auto is_choice = [&](const std::string& value) {
    return choices_.empty() || std::find(choices_.begin(), choices_.end(), value) != choices_.end();
  };
  const bool ok = std::visit(
      [&](const auto* target) {
        using T = std::remove_cvref_t<decltype(*target)>;
        if constexpr (kIsOptional<T>) {
          using V = typename T::value_type;
          if constexpr (std::is_arithmetic_v<V>) return in_range(static_cast<double>(target->value()));
          if constexpr (std::is_same_v<V, std::string>) return is_choice(target->value());
        } else if constexpr (std::is_arithmetic_v<T>) {
          return in_range(static_cast<double>(*target));
        } else if constexpr (std::is_same_v<T, std::string>) {
          return is_choice(*target);
        }
        return true;
      },
      target_);
  if (!ok) Refuse(where, shown, RuleText());
  if (check_) {
    if (const std::string rule = check_(); !rule.empty()) Refuse(where, shown, rule);
  }
  is_set_ = true;
  where_ = where;
}

void Option::RefuseIfChanged() const {
  if (refused_.empty() || !is_set_ || Print() == default_) return;
  Refuse(where_, IsBool() ? (Print() == "true" ? "" : "false") : Print(), refused_);
}

OptionSet::OptionSet(std::string command, std::string about, std::string positional, std::string* argument)
    : command_(std::move(command)), about_(std::move(about)), positional_(std::move(positional)), argument_(argument) {
  WEFT_CHECK(positional_.empty() == (argument_ == nullptr));
}

Option& OptionSet::Add(std::string name, OptionTarget target, std::string help) {
  WEFT_CHECK(Lookup("--" + name) == nullptr, "option {} is declared twice", name);
  options_.push_back(std::make_unique<Option>(std::move(name), target, std::move(help), group_));
  return *options_.back();
}

const Option* OptionSet::Find(std::string_view name) const {
  for (const auto& option : options_) {
    if (option->name_ == name) return option.get();
  }
  return nullptr;
}

bool OptionSet::IsSet(std::string_view name) const {
  const Option* option = Find(name);
  return option != nullptr && option->is_set_;
}

Option* OptionSet::Lookup(std::string_view spelling) const {
  for (const auto& option : options_) {
    if (spelling.starts_with("--") && spelling.substr(2) == option->name_) return option.get();
    for (const std::string& alias : option->aliases_) {
      if (alias == spelling) return option.get();
    }
  }
  return nullptr;
}

std::string OptionSet::Suggestion(std::string_view spelling) const {
  std::vector<std::string> known = {"--help", "--config"};
  for (const auto& option : options_) {
    known.push_back("--" + option->name_);
    if (option->IsBool()) known.push_back("--no-" + option->name_);
    known.insert(known.end(), option->aliases_.begin(), option->aliases_.end());
  }
  std::string best;
  size_t best_distance = std::max<size_t>(2, spelling.size() / 3) + 1;
  for (const std::string& candidate : known) {
    const size_t distance = EditDistance(spelling, candidate);
    if (distance < best_distance) best_distance = distance, best = candidate;
  }
  if (!best.empty()) return best;
  // What is a part of a name is a better guess than nothing: --parallel-size.
  for (const std::string& candidate : known) {
    if (spelling.size() > 4 && candidate.find(spelling.substr(2)) != std::string::npos) return candidate;
  }
  return "";
}

void OptionSet::Unknown(const std::string& shown, std::string_view spelling) const {
  const std::string suggestion = Suggestion(spelling);
  throw Error(fmt::format("unknown option {}{}", shown,
                          suggestion.empty() ? fmt::format(" ('{} --help' lists all)", command_)
                                             : fmt::format("; did you mean {}?", suggestion)),
              ErrorKind::kInvalidArgument, std::string(spelling));
}

OptionSet::Action OptionSet::Parse(const std::vector<std::string>& args) {
  struct Given {
    Option* option = nullptr;
    std::string shown;              // as the user spelt it
    std::vector<std::string> path;  // of a dotted key
    bool append = false;
    bool no = false;  // --no-flag
    std::optional<std::string> value;
    std::vector<std::string> words;
  };
  std::vector<Given> given;
  std::vector<std::string> loose;
  std::string config;
  std::string greedy;  // the list option that took the last words

  for (size_t i = 0; i < args.size(); ++i) {
    const std::string& word = args[i];
    if (word == "--") {
      loose.insert(loose.end(), args.begin() + static_cast<ptrdiff_t>(i) + 1, args.end());
      break;
    }
    if (!LooksLikeFlag(word)) {
      loose.push_back(word);
      continue;
    }
    Given g;
    std::string spelling = word;
    if (const size_t equals = word.find('='); equals != std::string::npos) {
      g.value = word.substr(equals + 1);
      spelling = word.substr(0, equals);
    }
    g.shown = spelling;
    if (const size_t dot = spelling.find('.'); dot != std::string::npos) {
      std::string path = spelling.substr(dot + 1);
      spelling.resize(dot);
      if (path.ends_with('+')) path.pop_back(), g.append = true;
      for (size_t begin = 0; begin <= path.size();) {
        const size_t end = std::min(path.find('.', begin), path.size());
        g.path.push_back(path.substr(begin, end - begin));
        begin = end + 1;
      }
    }
    spelling = NormalisedFlag(spelling);
    if (spelling == "--help" || spelling == "-h") return Action::kHelp;
    if (spelling == "--help-markdown") return Action::kHelpMarkdown;
    const auto take_value = [&] {
      if (g.value) return;
      if (i + 1 >= args.size() || LooksLikeFlag(args[i + 1])) {
        throw Error(fmt::format("{}: needs a value{}", g.shown,
                                i + 1 < args.size()
                                    ? fmt::format(" (one that begins with '-' is written {}={})", g.shown, args[i + 1])
                                    : ""),
                    ErrorKind::kInvalidArgument, spelling);
      }
      g.value = args[++i];
    };
    if (spelling == "--config") {
      take_value();
      config = *g.value;
      continue;
    }
    g.option = Lookup(spelling);
    if (g.option == nullptr && spelling.starts_with("--no-")) {
      g.option = Lookup("--" + spelling.substr(5));
      g.no = g.option != nullptr && g.option->IsBool();
      if (!g.no) g.option = nullptr;
    }
    if (g.option == nullptr) Unknown(g.shown, spelling);
    if (!g.path.empty()) {
      if (!g.option->IsJson()) {
        throw Error(fmt::format("{}: {} takes no dotted keys, only options with a JSON value do", g.shown, spelling),
                    ErrorKind::kInvalidArgument, spelling);
      }
      take_value();
    } else if (g.option->IsBool()) {
      if (g.no && g.value) {
        throw Error(fmt::format("{}={}: takes no value", g.shown, *g.value), ErrorKind::kInvalidArgument, spelling);
      }
    } else if (g.option->IsList() && !g.value) {
      take_value();
      g.words.push_back(*g.value);
      while (i + 1 < args.size() && !LooksLikeFlag(args[i + 1])) g.words.push_back(args[++i]), greedy = g.shown;
    } else {
      take_value();
    }
    given.push_back(std::move(g));
  }

  // The file first, so that the command line wins; a dotted key changes one member of what the file says.
  if (!config.empty()) ReadYaml(config);
  for (Given& g : given) {
    if (!g.path.empty()) {
      g.option->SetMember(g.shown, g.path, g.append, *g.value);
    } else if (g.option->IsBool()) {
      g.option->SetText(g.shown, g.no ? "false" : g.value.value_or("true"));
    } else if (!g.words.empty()) {
      g.option->SetList(g.shown, std::move(g.words));
    } else {
      g.option->SetText(g.shown, *g.value);
    }
  }
  if (argument_ != nullptr && !loose.empty()) {
    *argument_ = loose.front();
    loose.erase(loose.begin());
  }
  if (!loose.empty()) throw Error(fmt::format("unexpected argument '{}'", loose.front()));
  if (argument_ != nullptr && argument_->empty() && !positional_.starts_with('[')) {
    throw Error(fmt::format("{}: {} is missing{}", command_, positional_,
                            greedy.empty() ? ""
                                           : fmt::format(" ({} takes all words up to the next option: write {} first)",
                                                         greedy, positional_)));
  }
  for (const auto& option : options_) option->RefuseIfChanged();
  return Action::kRun;
}

void OptionSet::ReadYaml(const std::string& path) {
  YAML::Node root;
  try {
    root = YAML::LoadFile(path);
  } catch (const YAML::BadFile&) {
    throw Error(fmt::format("--config {}: cannot read this file", path), ErrorKind::kInvalidArgument, "--config");
  } catch (const YAML::Exception& e) {
    throw Error(fmt::format("--config {}:{}: not YAML: {}", path, e.mark.line + 1, e.msg), ErrorKind::kInvalidArgument,
                "--config");
  }
  if (root.IsNull()) return;
  if (!root.IsMap()) Throw("--config {}: must be a YAML mapping of option names to values", path);
  std::set<const Option*> seen;
  for (const auto& entry : root) {
    const std::string at = fmt::format("{}:{}", path, entry.first.Mark().line + 1);
    if (!entry.first.IsScalar()) Throw("{}: the name of an option must be a plain word", at);
    const std::string key = entry.first.Scalar();
    const std::string where = fmt::format("{}: {}", at, key);
    const std::string name = NormalisedFlag(key);
    const YAML::Node& value = entry.second;
    std::string lower(positional_);
    std::erase_if(lower, [](char c) { return c == '[' || c == ']'; });
    std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char c) { return std::tolower(c); });
    if (argument_ != nullptr && name == lower && value.IsScalar()) {
      *argument_ = value.Scalar();
      continue;
    }
    if (name == "config") Throw("{}: a config file cannot name another one", where);
    Option* option = Lookup("--" + name);
    if (option == nullptr) Unknown(fmt::format("'{}' ({})", key, at), "--" + name);
    if (!seen.insert(option).second) Throw("{}: stands twice in this file", where);
    if (value.IsNull()) Throw("{}: has no value", where);
    if (option->IsJson() && !value.IsScalar()) {
      option->SetJson(where, ToJson(value));
    } else if (value.IsSequence() && option->IsList()) {
      std::vector<std::string> words;
      for (const auto& item : value) {
        if (!item.IsScalar()) Throw("{}: must be a list of plain words", where);
        words.push_back(item.Scalar());
      }
      option->SetList(where, std::move(words));
    } else if (value.IsScalar()) {
      option->SetText(where, value.Scalar());
    } else {
      Throw("{}: must be a single value, not a {}", where, value.IsMap() ? "mapping" : "list");
    }
  }
}

std::string OptionSet::Help() const {
  std::string out =
      fmt::format("Usage: {}{}{} [options]\n\n{}\n", command_, positional_.empty() ? "" : " ", positional_, about_);
  const auto wrap = [&](const std::string& text) {
    constexpr size_t kIndent = 6, kWidth = 100;
    std::string line(kIndent, ' ');
    for (size_t begin = 0; begin < text.size();) {
      const size_t end = std::min(text.find(' ', begin), text.size());
      if (line.size() > kIndent && line.size() + 1 + end - begin > kWidth) {
        out += line + "\n";
        line.assign(kIndent, ' ');
      }
      if (line.size() > kIndent) line += ' ';
      line += text.substr(begin, end - begin);
      begin = end + 1;
    }
    out += line + "\n";
  };
  std::string group;
  for (const auto& o : options_) {
    if (o->group_ != group) out += fmt::format("\n{}:\n", group = o->group_);
    std::string flags = "--" + o->name_;
    if (o->IsBool()) flags += ", --no-" + o->name_;
    for (const std::string& alias : o->aliases_) flags += ", " + alias;
    if (const std::string type = o->TypeText(); !type.empty()) flags += " " + type;
    out += "  " + flags + "\n";
    std::string text = o->help_;
    if (!o->unused_.empty()) text += fmt::format(" Accepted and unused: {}.", o->unused_);
    if (!o->refused_.empty()) text += fmt::format(" Refused when changed: {}.", o->refused_);
    const std::string shown = o->default_text_.empty() ? o->default_ : o->default_text_;
    if (!shown.empty() && shown != "none") text += fmt::format(" Default: {}.", shown);
    wrap(text);
  }
  out +=
      "\nGeneral:\n  --config FILE\n      YAML file of options by their names; the command line wins.\n  -h, --help\n";
  return out;
}

std::string OptionSet::Markdown() const {
  std::string out = fmt::format("## {}{}{}\n\n{}\n", command_, positional_.empty() ? "" : " ", positional_, about_);
  std::string group;
  for (const auto& o : options_) {
    if (o->group_ != group) {
      out += fmt::format("\n### {}\n\n| option | default | meaning |\n|---|---|---|\n", group = o->group_);
    }
    std::string type = o->TypeText();
    std::string flags = fmt::format("`--{}{}{}`", o->name_, type.empty() ? "" : " ", type);
    if (o->IsBool()) flags += fmt::format(", `--no-{}`", o->name_);
    for (const std::string& alias : o->aliases_) flags += fmt::format(", `{}`", alias);
    std::string shown = o->default_text_.empty() ? o->default_ : o->default_text_;
    if (shown == "none") shown.clear();
    if (!shown.empty() && o->default_text_.empty()) shown = "`" + shown + "`";
    std::string text = o->help_;
    if (const std::string rule = o->RuleText(); !rule.empty() && o->choices_.empty()) {
      text += fmt::format(" ({})", rule);
    }
    if (!o->unused_.empty()) text += fmt::format(" *Accepted and unused: {}.*", o->unused_);
    if (!o->refused_.empty()) text += fmt::format(" *Refused when changed: {}.*", o->refused_);
    out += fmt::format("| {} | {} | {} |\n", MarkdownCell(flags), MarkdownCell(shown), MarkdownCell(text));
  }
  return out;
}

}  // namespace weft
