#include "weft/api/openai_request.h"

#include <algorithm>
#include <limits>

#include "weft/api/chat_messages.h"
#include "weft/api/json_fields.h"

namespace weft {
namespace {

constexpr size_t kMaxStopStrings = 128;
constexpr size_t kMaxStopBytes = 4096;  // of one stop string
constexpr size_t kMaxTokenList = 1 << 20;
constexpr size_t kMaxBadWords = 4096;
constexpr size_t kMaxNameBytes = 256;

void ReadStop(FieldReader& in, GenerationRequest& out) {
  const Json* stop = in.Get("stop");
  if (stop == nullptr) return;
  std::vector<std::string> strings;
  if (stop->is_string()) {
    strings.push_back(stop->get<std::string>());
  } else if (stop->is_array()) {
    strings = in.Strings("stop", kMaxStopStrings).value_or(std::vector<std::string>());
  } else {
    in.Fail("stop", "`stop` must be a string or an array of strings, got " + ShortDump(*stop));
  }
  for (const std::string& s : strings) {
    if (s.empty()) in.Fail("stop", "`stop` must not contain an empty string");
    if (s.size() > kMaxStopBytes) {
      in.Fail("stop", fmt::format("`stop` has a string of {} bytes, the most allowed is {}", s.size(), kMaxStopBytes));
    }
  }
  out.params.stop = std::move(strings);
}

void ReadLogitBias(FieldReader& in, int64_t vocab_size, GenerationRequest& out) {
  const Json* bias = in.Object("logit_bias");
  if (bias == nullptr) return;
  for (const auto& item : bias->items()) {
    const std::string& key = item.key();
    int64_t id = -1;
    // Digits only: no sign, no blanks, short enough for int64.
    if (!key.empty() && key.size() <= 10 &&
        std::all_of(key.begin(), key.end(), [](char c) { return c >= '0' && c <= '9'; })) {
      id = std::stoll(key);
    }
    if (id < 0 || id >= vocab_size) {
      in.Fail("logit_bias", fmt::format("`logit_bias` must have token ids between 0 and {} as keys, got {}",
                                        vocab_size - 1, ShortDump(Json(key))));
      return;
    }
    const bool number = item.value().is_number();
    const double value = number ? item.value().get<double>() : 0.0;
    if (!number || !(value >= -100.0 && value <= 100.0)) {
      in.Fail("logit_bias", fmt::format("`logit_bias` must have numbers between -100 and 100 as values, got {} for {}",
                                        ShortDump(item.value()), key));
      return;
    }
    out.params.logit_bias[static_cast<int32_t>(id)] = static_cast<float>(value);
  }
}

void ReadStreaming(FieldReader& in, GenerationRequest& out) {
  out.stream = in.Bool("stream").value_or(false);
  const Json* options = in.Object("stream_options");
  if (options == nullptr) return;
  if (!out.stream) {
    in.Fail("stream_options", "`stream_options` can only be given together with `stream`: true");
    return;
  }
  FieldReader sub(*options, "stream_options.");
  out.include_usage = sub.Bool("include_usage").value_or(true);
  out.continuous_usage_stats = out.include_usage && sub.Bool("continuous_usage_stats").value_or(false);
  if (!sub.ok()) in.Fail("stream_options", sub.error().value().what());
}

// A number of alternatives per token: 0 .. max_logprobs, or -1 (all) where the server allows that.
std::optional<int32_t> ReadLogprobCount(FieldReader& in, const char* name, const RequestLimits& limits) {
  const std::optional<int64_t> count = in.Int(name, -1, INT32_MAX);
  if (!count) return std::nullopt;
  const int64_t allowed = limits.max_logprobs < 0 ? limits.vocab_size : limits.max_logprobs;
  if ((*count < 0 && limits.max_logprobs >= 0) || *count > allowed) {
    in.Fail(name, fmt::format("`{}` must be between 0 and {}, got {}", name, allowed, *count));
    return std::nullopt;
  }
  return static_cast<int32_t>(*count);
}

void ReadSampling(FieldReader& in, const RequestLimits& limits, GenerationRequest& out) {
  SamplingParams& p = out.params;
  const SamplingDefaults& d = limits.defaults;
  const auto unit = [](float x) { return x >= 0 && x <= 1; };
  const auto penalty = [](float x) { return x >= -2 && x <= 2; };
  p.temperature =
      in.Number("temperature", "at least 0", [](float x) { return x >= 0; }).value_or(d.temperature.value_or(1.0f));
  p.top_p = in.Number("top_p", "above 0 and at most 1", [](float x) {
                return x > 0 && x <= 1;
              }).value_or(d.top_p.value_or(1.0f));
  p.min_p = in.Number("min_p", "between 0 and 1", unit).value_or(d.min_p.value_or(0.0f));
  p.top_k = static_cast<int32_t>(in.Int("top_k", -1, INT32_MAX).value_or(d.top_k.value_or(0)));
  p.presence_penalty = in.Number("presence_penalty", "between -2 and 2", penalty).value_or(0.0f);
  p.frequency_penalty = in.Number("frequency_penalty", "between -2 and 2", penalty).value_or(0.0f);
  p.repetition_penalty = in.Number("repetition_penalty", "above 0", [](float x) {
                             return x > 0;
                           }).value_or(d.repetition_penalty.value_or(1.0f));
  if (const auto seed = in.Int("seed", INT64_MIN, INT64_MAX)) p.seed = static_cast<uint64_t>(*seed);

  ReadStop(in, out);
  ReadLogitBias(in, limits.vocab_size, out);
  if (auto ids = in.TokenIds("stop_token_ids", limits.vocab_size, kMaxTokenList)) p.stop_token_ids = std::move(*ids);
  if (auto ids = in.TokenIds("allowed_token_ids", limits.vocab_size, kMaxTokenList)) {
    if (ids->empty()) in.Fail("allowed_token_ids", "`allowed_token_ids` must not be empty");
    p.allowed_token_ids = std::move(*ids);
  }
  if (auto words = in.Strings("bad_words", kMaxBadWords)) {
    for (const std::string& word : *words) {
      if (word.empty()) in.Fail("bad_words", "`bad_words` must not contain an empty string");
    }
    out.bad_words = std::move(*words);
  }

  p.min_tokens = static_cast<int32_t>(in.Int("min_tokens", 0, INT32_MAX).value_or(0));
  p.ignore_eos = in.Bool("ignore_eos").value_or(false);
  p.include_stop_str_in_output = in.Bool("include_stop_str_in_output").value_or(false);
  p.skip_special_tokens = in.Bool("skip_special_tokens").value_or(true);
  p.spaces_between_special_tokens = in.Bool("spaces_between_special_tokens").value_or(true);
  p.prompt_logprobs = ReadLogprobCount(in, "prompt_logprobs", limits);
}

// What generation requests have in common, but for max_tokens, logprobs and the prompt.
void ReadCommon(FieldReader& in, const RequestLimits& limits, GenerationRequest& out) {
  out.model = in.String("model").value_or("");
  if (auto id = in.String("request_id")) {
    if (id->size() > kMaxNameBytes) in.Fail("request_id", "`request_id` is longer than 256 bytes");
    out.request_id = std::move(*id);
  }
  ReadSampling(in, limits, out);
  ReadStreaming(in, out);
  if (out.stream && out.params.prompt_logprobs.value_or(0) != 0) {
    in.Fail("prompt_logprobs", "`prompt_logprobs` is not available with `stream`: true");
  }
  out.n = static_cast<int32_t>(in.Int("n", 1, limits.max_n).value_or(1));
  if (const auto best_of = in.Int("best_of", 1, INT32_MAX); best_of && *best_of != out.n) {
    in.Fail("best_of", fmt::format("`best_of` must equal `n` ({}), got {}", out.n, *best_of));
  }
  out.echo = in.Bool("echo").value_or(false);
  out.return_token_ids = in.Bool("return_token_ids").value_or(false);
  out.return_tokens_as_token_ids = in.Bool("return_tokens_as_token_ids").value_or(false);
  out.priority = static_cast<int32_t>(in.Int("priority", INT32_MIN, INT32_MAX).value_or(0));
  if (auto salt = in.String("cache_salt")) {
    if (salt->empty() || salt->size() > 1024) in.Fail("cache_salt", "`cache_salt` must have 1 to 1024 bytes");
    out.cache_salt = std::move(*salt);
  }
  if (const auto count = in.Int("truncate_prompt_tokens", -1, INT64_MAX)) {
    if (*count == 0 || *count > limits.max_model_len) {
      in.Fail(
          "truncate_prompt_tokens",
          fmt::format("`truncate_prompt_tokens` must be -1 or between 1 and the model's context length of {}, got {}",
                      limits.max_model_len, *count));
    }
    out.truncate_prompt_tokens = count;
  }
  if (const auto side = in.String("truncation_side")) {
    if (*side != "left" && *side != "right") {
      in.Fail("truncation_side", "`truncation_side` must be \"left\" or \"right\", got " + ShortDump(Json(*side)));
    }
    out.truncation_side = *side == "right" ? TruncationSide::kRight : TruncationSide::kLeft;
  }

  if (const Json* format = in.Object("response_format")) {
    const auto type = format->find("type");
    if (type == format->end() || !type->is_string()) {
      in.Fail("response_format", "`response_format.type` must be a string");
    } else if (*type != "text") {
      in.Fail("response_format",
              fmt::format("`response_format` of type {} is not supported yet, only \"text\" is", ShortDump(*type)));
    }
  }
  in.Refuse({"structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structural_tag",
             "use_beam_search", "logits_processors", "logprob_token_ids", "kv_transfer_params"});
  in.Ignore({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"});
}

// Reads the field under which the client limits the answer. `fallback`: without it.
void ReadMaxTokens(FieldReader& in, const char* name, int64_t min, GenerationRequest& out) {
  const auto value = in.Int(name, min, INT32_MAX);
  if (!value) return;
  out.max_tokens = static_cast<int32_t>(*value);
  out.max_tokens_explicit = true;
  out.max_tokens_field = name;
}

void CheckMinTokens(FieldReader& in, const GenerationRequest& request) {
  if (request.max_tokens && request.params.min_tokens > std::max(1, *request.max_tokens)) {
    in.Fail("min_tokens", fmt::format("`min_tokens` ({}) must not exceed `max_tokens` ({})", request.params.min_tokens,
                                      *request.max_tokens));
  }
}

void CheckText(FieldReader& in, const std::string& text) {
  if (text.empty()) in.Fail("prompt", "`prompt` must not be empty");
}

std::vector<int32_t> ReadPromptIds(FieldReader& in, const Json& list, int64_t vocab_size) {
  std::vector<int32_t> ids;
  ids.reserve(list.size());
  for (const Json& entry : list) {
    const std::optional<int64_t> id = entry.is_number_integer() ? IntegerOf(entry) : std::nullopt;
    if (!id || *id < 0 || *id >= vocab_size) {
      in.Fail("prompt",
              fmt::format("`prompt` must hold token ids between 0 and {}, got {}", vocab_size - 1, ShortDump(entry)));
      return ids;
    }
    ids.push_back(static_cast<int32_t>(*id));
  }
  return ids;
}

void ReadPrompts(FieldReader& in, const RequestLimits& limits, CompletionRequest& out) {
  const Json* prompt = in.Get("prompt");
  if (prompt == nullptr) {
    in.Fail("prompt", "`prompt` is required");
    return;
  }
  if (prompt->is_string()) {
    out.prompts.emplace_back(prompt->get<std::string>());
    CheckText(in, std::get<std::string>(out.prompts.back()));
    return;
  }
  if (!prompt->is_array() || prompt->empty()) {
    in.Fail("prompt",
            "`prompt` must be a string, an array of strings, an array of token ids or an array of such, "
            "and not empty; got " +
                ShortDump(*prompt));
    return;
  }
  if (prompt->front().is_number()) {
    out.prompts.emplace_back(ReadPromptIds(in, *prompt, limits.vocab_size));
    return;
  }
  if (prompt->size() > static_cast<size_t>(limits.max_prompts)) {
    in.Fail("prompt",
            fmt::format("`prompt` has {} entries, the most allowed is {}", prompt->size(), limits.max_prompts));
    return;
  }
  for (const Json& entry : *prompt) {
    if (entry.is_string()) {
      out.prompts.emplace_back(entry.get<std::string>());
      CheckText(in, std::get<std::string>(out.prompts.back()));
    } else if (entry.is_array() && !entry.empty()) {
      out.prompts.emplace_back(ReadPromptIds(in, entry, limits.vocab_size));
    } else {
      in.Fail("prompt", "`prompt` must hold strings or arrays of token ids, none empty; got " + ShortDump(entry));
    }
    if (!in.ok()) return;
  }
}

// The chat fields that generation and tokenization have in common.
void ReadChat(FieldReader& in, ChatPrompt& out) {
  const Json* messages = in.Array("messages");
  if (messages == nullptr) {
    in.Fail("messages", "`messages` is required");
    return;
  }
  Result<NormalizedMessages> normalized = NormalizeMessages(*messages);
  if (!normalized) {
    in.Fail(normalized.error().param(), normalized.error().what());
    return;
  }
  out.messages_json = normalized->json.dump();
  out.last_role = normalized->last_role;
  out.last_content = normalized->last_content;

  if (const Json* tools = in.Array("tools")) {
    if (const Result<void> valid = CheckTools(*tools); !valid) in.Fail("tools", valid.error().what());
    out.tools_json = tools->dump();
  }
  if (const Json* documents = in.Array("documents")) {
    for (const Json& document : *documents) {
      if (!document.is_object()) in.Fail("documents", "`documents` must hold objects, got " + ShortDump(document));
    }
    out.documents_json = documents->dump();
  }
  out.chat_template = in.String("chat_template");

  Json kwargs = Json::object();
  if (const Json* given = in.Object("chat_template_kwargs")) kwargs = *given;
  if (const auto effort = in.String("reasoning_effort")) {
    // Templates that know neither variable are not affected by them.
    if (!kwargs.contains("reasoning_effort")) kwargs["reasoning_effort"] = *effort;
    if (!kwargs.contains("enable_thinking")) kwargs["enable_thinking"] = *effort != "none";
  }
  if (!kwargs.empty()) out.kwargs_json = kwargs.dump();

  out.continue_final_message = in.Bool("continue_final_message").value_or(false);
  const std::optional<bool> add_prompt = in.Bool("add_generation_prompt");
  out.add_generation_prompt = add_prompt.value_or(!out.continue_final_message);
  if (out.continue_final_message && out.add_generation_prompt) {
    in.Fail("add_generation_prompt", "`add_generation_prompt` and `continue_final_message` cannot both be true");
  }
}

void ReadToolChoice(FieldReader& in, const ChatPrompt& chat) {
  const Json* choice = in.Get("tool_choice");
  if (choice == nullptr) return;
  if (*choice == "none") return;
  if (*choice == "auto") {
    if (!chat.tools_json) in.Fail("tool_choice", "`tool_choice` needs `tools`");
    return;
  }
  if (*choice == "required" || choice->is_object()) {
    in.Fail("tool_choice", fmt::format("`tool_choice` {} is not supported yet, only \"none\" and \"auto\" are",
                                       choice->is_object() ? "with a named function" : "\"required\""));
    return;
  }
  in.Fail("tool_choice",
          "`tool_choice` must be \"none\", \"auto\", \"required\" or name a function, got " + ShortDump(*choice));
}

template <typename T>
Result<T> Done(FieldReader& in, T request) {
  if (!in.ok()) return in.error();
  request.unknown_fields = in.Unknown();
  return request;
}

}  // namespace

Result<CompletionRequest> ParseCompletionRequest(std::string_view body, const RequestLimits& limits) {
  const Result<Json> json = ParseJsonObject(body);
  if (!json) return tl::make_unexpected(json.error());
  FieldReader in(*json);
  CompletionRequest out;
  in.Refuse({"prompt_embeds"});
  if (in.Get("suffix") != nullptr) in.Fail("suffix", "`suffix` is not supported");
  ReadPrompts(in, limits, out);
  ReadCommon(in, limits, out);
  out.add_special_tokens = in.Bool("add_special_tokens").value_or(true);
  out.params.logprobs = ReadLogprobCount(in, "logprobs", limits);

  // With echo, 0 asks for the prompt's log-probabilities alone.
  ReadMaxTokens(in, "max_tokens", out.echo ? 0 : 1, out);
  if (!out.max_tokens) out.max_tokens = 16;
  out.prompt_only = out.echo && *out.max_tokens == 0;
  CheckMinTokens(in, out);
  if (out.echo && !out.params.prompt_logprobs) out.params.prompt_logprobs = out.params.logprobs;
  if (in.ok() && static_cast<int64_t>(out.prompts.size()) * out.n > limits.max_choices) {
    in.Fail("n", fmt::format("{} prompts with `n` = {} make more than {} choices", out.prompts.size(), out.n,
                             limits.max_choices));
  }
  return Done(in, std::move(out));
}

Result<ChatCompletionRequest> ParseChatCompletionRequest(std::string_view body, const RequestLimits& limits) {
  const Result<Json> json = ParseJsonObject(body);
  if (!json) return tl::make_unexpected(json.error());
  FieldReader in(*json);
  ChatCompletionRequest out;
  out.prompt_field = "messages";
  ReadChat(in, out.chat);
  ReadToolChoice(in, out.chat);
  ReadCommon(in, limits, out);
  out.add_special_tokens = in.Bool("add_special_tokens").value_or(false);

  const bool logprobs = in.Bool("logprobs").value_or(false);
  const std::optional<int32_t> top = ReadLogprobCount(in, "top_logprobs", limits);
  if (top.value_or(0) != 0 && !logprobs) in.Fail("top_logprobs", "`top_logprobs` needs `logprobs`: true");
  if (logprobs) out.params.logprobs = top.value_or(0);
  if (out.echo && logprobs && !out.params.prompt_logprobs && !out.stream) out.params.prompt_logprobs = top.value_or(0);

  ReadMaxTokens(in, "max_tokens", 1, out);
  ReadMaxTokens(in, "max_completion_tokens", 1, out);  // the newer name wins
  CheckMinTokens(in, out);
  in.Refuse({"audio", "function_call", "functions"});
  if (const auto modalities = in.Strings("modalities", 8);
      modalities && *modalities != std::vector<std::string>{"text"}) {
    in.Fail("modalities", "`modalities` other than [\"text\"] are not supported");
  }
  in.Ignore({"include_reasoning", "parallel_tool_calls", "mm_processor_kwargs", "media_io_kwargs"});
  return Done(in, std::move(out));
}

Result<TokenizeRequest> ParseTokenizeRequest(std::string_view body) {
  const Result<Json> json = ParseJsonObject(body);
  if (!json) return tl::make_unexpected(json.error());
  FieldReader in(*json);
  TokenizeRequest out;
  out.model = in.String("model").value_or("");
  if (in.Get("messages") != nullptr) {
    ReadChat(in, out.input.emplace<ChatPrompt>());
    out.add_special_tokens = in.Bool("add_special_tokens").value_or(false);
  } else {
    std::optional<std::string> prompt = in.String("prompt");
    if (!prompt) in.Fail("prompt", "`prompt` or `messages` is required");
    out.input = std::move(prompt).value_or("");
    out.add_special_tokens = in.Bool("add_special_tokens").value_or(true);
  }
  out.return_token_strs = in.Bool("return_token_strs").value_or(false);
  return Done(in, std::move(out));
}

Result<DetokenizeRequest> ParseDetokenizeRequest(std::string_view body, const RequestLimits& limits) {
  const Result<Json> json = ParseJsonObject(body);
  if (!json) return tl::make_unexpected(json.error());
  FieldReader in(*json);
  DetokenizeRequest out;
  out.model = in.String("model").value_or("");
  std::optional<std::vector<int32_t>> tokens =
      in.TokenIds("tokens", limits.vocab_size, std::numeric_limits<size_t>::max());
  if (!tokens) in.Fail("tokens", "`tokens` is required");
  out.tokens = std::move(tokens).value_or(std::vector<int32_t>());
  return Done(in, std::move(out));
}

Result<int32_t> FitMaxTokens(const GenerationRequest& request, int64_t prompt_tokens, const RequestLimits& limits) {
  const int64_t limit = limits.max_model_len;
  const auto refuse = [&](std::string message, const std::string& param) {
    return tl::make_unexpected(Error(std::move(message), ErrorKind::kInvalidArgument, param));
  };
  // Scoring a prompt needs no room for an answer.
  const bool none_wanted = request.max_tokens && *request.max_tokens == 0;
  if (prompt_tokens > limit || (prompt_tokens == limit && !none_wanted)) {
    return refuse(
        fmt::format("The prompt has {} tokens, but this model's context length is {} tokens, which the prompt "
                    "and at least one generated token have to fit into. Please shorten the prompt.",
                    prompt_tokens, limit),
        request.prompt_field);
  }
  const int64_t room = std::max<int64_t>(1, limit - prompt_tokens);
  if (request.max_tokens_explicit && *request.max_tokens > room) {
    return refuse(
        fmt::format("`{}` is too large: {} tokens are asked for and the prompt has {} tokens, but this model's "
                    "context length is {} tokens. Please reduce `{}` or the prompt.",
                    request.max_tokens_field, *request.max_tokens, prompt_tokens, limit, request.max_tokens_field),
        request.max_tokens_field);
  }
  int64_t result = std::min<int64_t>(request.max_tokens.value_or(INT32_MAX), room);
  if (limits.defaults.max_tokens) result = std::min<int64_t>(result, *limits.defaults.max_tokens);
  result = std::clamp<int64_t>(result, 1, INT32_MAX);
  if (request.params.min_tokens > result) {
    return refuse(fmt::format("`min_tokens` is {}, but at most {} tokens can be generated here",
                              request.params.min_tokens, result),
                  "min_tokens");
  }
  return static_cast<int32_t>(result);
}

}  // namespace weft
