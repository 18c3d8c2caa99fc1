#pragma once
// What a model's files say about its text: read from a folder or a GGUF file, used by the tokenizer.

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "weft/text/rust.h"

namespace weft {

struct Vocabulary {
  rust::TokenizerPtr tokenizer;
  std::map<std::string, std::string> special_tokens;  // "bos_token" -> "<s>", ...: variables of the chat template
  std::map<std::string, std::string> chat_templates;  // by name: "default", "tool_use", ...
  std::optional<int32_t> bos;
  std::vector<int32_t> eos;
};

// nullopt when there is no such token.
std::optional<int32_t> FindToken(const wt_tokenizer* tokenizer, std::string_view token);
// Appends an id once.
void AddEos(Vocabulary& vocabulary, std::optional<int32_t> id);

// Both throw weft::Error.
Vocabulary ReadHfFolder(const std::string& folder);
Vocabulary ReadGgufVocabulary(const std::string& path);

}  // namespace weft
