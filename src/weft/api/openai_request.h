#pragma once
// The bodies of /v1/completions, /v1/chat/completions, /tokenize and /detokenize, read and checked.
// Field names, defaults and ranges are vLLM's; where vLLM coerces types ("5" for 5) these readers refuse.

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "weft/api/sampling_params.h"
#include "weft/core/error.h"

namespace weft {

// What a request gets for a parameter that it leaves out (from generation_config.json or flags).
struct SamplingDefaults {
  std::optional<float> temperature;
  std::optional<float> top_p;
  std::optional<int32_t> top_k;
  std::optional<float> min_p;
  std::optional<float> repetition_penalty;
  std::optional<int32_t> max_tokens;  // also an upper limit of what a request may ask for
};

struct RequestLimits {
  int64_t max_model_len = 0;
  int64_t vocab_size = 0;
  int32_t max_logprobs = 20;  // -1: none
  int32_t max_n = 128;
  int32_t max_prompts = 1024;
  int32_t max_choices = 2048;  // prompts times n
  SamplingDefaults defaults;
};

enum class TruncationSide { kLeft, kRight };

// What completions and chat completions have in common.
struct GenerationRequest {
  std::string model;       // empty: the first one served
  std::string request_id;  // the client's own, empty when there is none

  // Complete but for max_tokens (FitMaxTokens) and bad_words (they have to be tokenized).
  SamplingParams params;
  std::vector<std::string> bad_words;
  std::optional<int32_t> max_tokens;  // as asked for or by default; nothing: as many as fit
  bool max_tokens_explicit = false;
  std::string max_tokens_field;         // the name under which the client gave it
  const char* prompt_field = "prompt";  // where the prompt comes from

  int32_t n = 1;
  bool stream = false;
  bool include_usage = false;           // a last chunk with the usage
  bool continuous_usage_stats = false;  // usage in every chunk
  bool echo = false;
  bool return_token_ids = false;
  bool return_tokens_as_token_ids = false;
  bool add_special_tokens = false;
  int32_t priority = 0;
  std::string cache_salt;

  // Keeps this many tokens of a longer prompt; -1 stands for as many as the model takes.
  std::optional<int64_t> truncate_prompt_tokens;
  TruncationSide truncation_side = TruncationSide::kLeft;  // the side that is cut off

  std::vector<std::string> unknown_fields;
};

using Prompt = std::variant<std::string, std::vector<int32_t>>;

struct CompletionRequest : GenerationRequest {
  std::vector<Prompt> prompts;  // at least one, none empty
  // echo with max_tokens 0: the prompt is scored and nothing is generated (params.max_tokens is 1 all the same).
  bool prompt_only = false;
};

// What a chat template is rendered from; each *_json is a JSON text or absent.
struct ChatPrompt {
  std::string messages_json;
  std::optional<std::string> tools_json;
  std::optional<std::string> kwargs_json;
  std::optional<std::string> documents_json;
  std::optional<std::string> chat_template;
  bool add_generation_prompt = true;
  bool continue_final_message = false;
  std::string last_role;
  std::string last_content;
};

struct ChatCompletionRequest : GenerationRequest {
  ChatPrompt chat;
};

struct TokenizeRequest {
  std::string model;
  std::variant<std::string, ChatPrompt> input;
  bool add_special_tokens = true;
  bool return_token_strs = false;
  std::vector<std::string> unknown_fields;
};

struct DetokenizeRequest {
  std::string model;
  std::vector<int32_t> tokens;
  std::vector<std::string> unknown_fields;
};

// All: kInvalidArgument naming the field.
Result<CompletionRequest> ParseCompletionRequest(std::string_view body, const RequestLimits& limits);
Result<ChatCompletionRequest> ParseChatCompletionRequest(std::string_view body, const RequestLimits& limits);
Result<TokenizeRequest> ParseTokenizeRequest(std::string_view body);
Result<DetokenizeRequest> ParseDetokenizeRequest(std::string_view body, const RequestLimits& limits);

// The number of tokens that a request with a prompt of `prompt_tokens` may generate, or kInvalidArgument with both
// counts when prompt and answer do not fit into the model's context. Only what the client asked for itself is refused;
// a default is cut to what fits.
Result<int32_t> FitMaxTokens(const GenerationRequest& request, int64_t prompt_tokens, const RequestLimits& limits);

}  // namespace weft
