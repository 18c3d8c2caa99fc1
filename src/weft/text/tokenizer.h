#pragma once
// Tokenizer, incremental decoding and chat templates, by way of the Rust library in rust/text.

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "weft/core/error.h"

namespace weft {

// Turns a growing token sequence into text. Never emits half a UTF-8 character; what can no longer become a character
// comes out as U+FFFD, and nothing waits for longer than 16 tokens. Ids outside the vocabulary give no text. Neither
// call throws. Not thread-safe; one request, one stream.
class TokenStream {
 public:
  virtual ~TokenStream() = default;
  // The text that this token completes, often empty in the middle of a character.
  virtual std::string Push(int32_t token) = 0;
  // What was held back until now: call once, at the end.
  virtual std::string Flush() = 0;
};

struct ChatTemplateInput {
  std::string messages_json;               // OpenAI messages, a JSON array
  std::optional<std::string> tools_json;   // a JSON array
  std::optional<std::string> kwargs_json;  // chat_template_kwargs, a JSON object
  std::optional<std::string> documents_json;
  bool add_generation_prompt = true;
  bool continue_final_message = false;           // excludes add_generation_prompt
  std::optional<std::string> template_override;  // --chat-template or the request's chat_template
  // Bring the messages into the form that the template takes: tool call arguments as text or object, lists of text
  // parts joined, null content as "". Without it the template gets them as they are, as in transformers.
  bool adapt_messages = true;
};

// Immutable and thread-safe.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  // `text` must be UTF-8, else weft::Error. Special tokens written in the text become those tokens.
  virtual std::vector<int32_t> Encode(std::string_view text, bool add_special_tokens) const = 0;
  virtual std::string Decode(std::span<const int32_t> tokens, bool skip_special_tokens) const = 0;
  virtual std::unique_ptr<TokenStream> MakeStream(bool skip_special_tokens) const = 0;
  // kInvalidArgument with the template's own message when it raises.
  virtual Result<std::string> ApplyChatTemplate(const ChatTemplateInput& input) const = 0;
  virtual bool has_chat_template() const = 0;

  // The largest id + 1; the model's embedding may have more rows.
  virtual int32_t vocab_size() const = 0;
  // The token as it stands in the vocabulary (not decoded); empty when there is none.
  virtual std::string TokenString(int32_t token) const = 0;
  virtual std::optional<int32_t> TokenId(std::string_view token) const = 0;
  // From tokenizer_config.json / generation_config.json or the GGUF's metadata.
  virtual std::optional<int32_t> bos_token_id() const = 0;
  virtual std::vector<int32_t> eos_token_ids() const = 0;  // the tokenizer's own first
};

// `path`: a Hugging Face folder (tokenizer.json [, tokenizer_config.json] [, chat_template.jinja]) or a .gguf file with
// a vocabulary. Throws weft::Error.
std::shared_ptr<const Tokenizer> LoadTokenizer(const std::string& path);

}  // namespace weft
