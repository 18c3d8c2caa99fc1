#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "weft/core/mapped_file.h"
#include "weft/text/vocabulary.h"

namespace weft {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

std::optional<std::string> ReadText(const fs::path& path) {
  if (!fs::exists(path)) return std::nullopt;
  const MappedFile file(path.string());
  return std::string(reinterpret_cast<const char*>(file.data()), file.size());
}

// An empty object when there is no such file.
json ReadObject(const fs::path& path) {
  const auto text = ReadText(path);
  if (!text) return json::object();
  json value;
  try {
    value = json::parse(*text);
  } catch (const json::exception& e) {
    Throw("{}: {}", path.string(), e.what());
  }
  if (!value.is_object()) Throw("{}: must hold a JSON object", path.string());
  return value;
}

// A token of a configuration file: its text, or an object that has it as "content".
std::optional<std::string> TokenText(const json& config, const char* key) {
  const auto it = config.find(key);
  if (it == config.end()) return std::nullopt;
  if (it->is_string()) return it->get<std::string>();
  if (it->is_object() && it->contains("content") && it->at("content").is_string()) return it->at("content");
  return std::nullopt;
}

// An id or a list of ids.
std::vector<int32_t> TokenIds(const json& config, const char* key, const fs::path& path) {
  const auto it = config.find(key);
  if (it == config.end() || it->is_null()) return {};
  std::vector<int32_t> ids;
  const json list = it->is_array() ? *it : json::array({*it});
  for (const json& id : list) {
    if (!id.is_number_integer() || id < 0 || id > std::numeric_limits<int32_t>::max()) {
      Throw("{}: {} {} is no token id", path.string(), key, id.dump());
    }
    ids.push_back(id.get<int32_t>());
  }
  return ids;
}

// In rising order of precedence: tokenizer_config.json, chat_template.json, chat_template.jinja.
void ReadChatTemplates(const fs::path& folder, const json& config, Vocabulary& out) {
  const auto take = [&](const json& from, const std::string& file) {
    const auto it = from.find("chat_template");
    if (it == from.end() || it->is_null()) return;
    if (it->is_string()) {
      out.chat_templates["default"] = it->get<std::string>();
      return;
    }
    const auto wrong = [&] {
      Throw("{}: chat_template must be text or a list of {{name, template}}", (folder / file).string());
    };
    if (!it->is_array()) wrong();
    for (const json& entry : *it) {
      if (!entry.is_object() || !entry.contains("name") || !entry["name"].is_string() || !entry.contains("template") ||
          !entry["template"].is_string()) {
        wrong();
      }
      out.chat_templates[entry["name"]] = entry["template"];
    }
  };
  take(config, "tokenizer_config.json");
  take(ReadObject(folder / "chat_template.json"), "chat_template.json");
  if (auto text = ReadText(folder / "chat_template.jinja")) out.chat_templates["default"] = std::move(*text);
  const fs::path more = folder / "additional_chat_templates";
  if (!fs::is_directory(more)) return;
  for (const auto& entry : fs::directory_iterator(more)) {
    if (entry.path().extension() == ".jinja") {
      out.chat_templates[entry.path().stem().string()] = ReadText(entry.path()).value();
    }
  }
}

}  // namespace

Vocabulary ReadHfFolder(const std::string& folder) {
  const fs::path root(folder);
  const fs::path tokenizer_path = root / "tokenizer.json";
  if (!fs::exists(tokenizer_path)) {
    throw Error(fmt::format("{} does not exist: without a tokenizer a model can be served by token ids only "
                            "(--skip-tokenizer-init)",
                            tokenizer_path.string()),
                ErrorKind::kNotFound);
  }
  Vocabulary out;
  const MappedFile tokenizer_json(tokenizer_path.string());
  const auto config_text = ReadText(root / "tokenizer_config.json");
  const json config = ReadObject(root / "tokenizer_config.json");
  wt_tokenizer* tokenizer = nullptr;
  rust::Buf error;
  const wt_str bytes = rust::Str({reinterpret_cast<const char*>(tokenizer_json.data()), tokenizer_json.size()});
  const wt_status status =
      wt_tokenizer_from_json(bytes, config_text ? rust::Str(*config_text) : rust::kNotGiven, &tokenizer, error.out());
  if (status != WT_OK) throw rust::MakeError(status, error, folder);
  out.tokenizer.reset(tokenizer);

  const json older = ReadObject(root / "special_tokens_map.json");
  for (const char* key : {"bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"}) {
    auto text = TokenText(config, key);
    if (!text && !config.contains(key)) text = TokenText(older, key);
    if (text) out.special_tokens[key] = *text;
  }
  const auto id_of = [&](const char* key) -> std::optional<int32_t> {
    const auto it = out.special_tokens.find(key);
    return it == out.special_tokens.end() ? std::nullopt : FindToken(tokenizer, it->second);
  };
  // Models without a generation_config.json have these keys in config.json.
  const char* generation_name = fs::exists(root / "generation_config.json") ? "generation_config.json" : "config.json";
  const json generation = ReadObject(root / generation_name);
  out.bos = id_of("bos_token");
  if (!out.bos) {
    const auto ids = TokenIds(generation, "bos_token_id", root / generation_name);
    if (!ids.empty()) out.bos = ids[0];
  }
  AddEos(out, id_of("eos_token"));
  for (const int32_t id : TokenIds(generation, "eos_token_id", root / generation_name)) AddEos(out, id);
  ReadChatTemplates(root, config, out);
  return out;
}

}  // namespace weft
