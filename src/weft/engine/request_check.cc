#include "weft/engine/request_check.h"

#include <cmath>

#include "weft/core/utf8.h"

namespace weft {
namespace {

template <typename... Args>
tl::unexpected<Error> Refuse(const char* param, fmt::format_string<Args...> format, Args&&... args) {
  return tl::make_unexpected(
      Error(fmt::format(format, std::forward<Args>(args)...), ErrorKind::kInvalidArgument, param));
}

Result<void> CheckIds(const char* param, const std::vector<int32_t>& ids, int64_t vocab_size) {
  for (const int32_t id : ids) {
    if (id < 0 || id >= vocab_size) {
      return Refuse(param, "{}: token id {} is out of range, the vocabulary has {} tokens.", param, id, vocab_size);
    }
  }
  return {};
}

Result<void> CheckNumber(const char* param, float value, bool ok, const char* rule) {
  if (!std::isfinite(value) || !ok) return Refuse(param, "{} = {}: must be {}.", param, value, rule);
  return {};
}

Result<void> CheckLogprobs(const char* param, const std::optional<int32_t>& asked, const RequestBounds& bounds) {
  if (!asked) return {};
  if (*asked < -1) return Refuse(param, "{} = {}: must be -1 (the whole vocabulary), 0 or more.", param, *asked);
  const int64_t count = *asked == -1 ? bounds.vocab_size : *asked;
  const int64_t limit = bounds.max_logprobs == -1 ? bounds.vocab_size : bounds.max_logprobs;
  if (count > limit) {
    return Refuse(param, "{} = {}: at most {} may be asked for (--max-logprobs).", param, *asked, limit);
  }
  return {};
}

Result<void> CheckSampling(const SamplingParams& p, int64_t vocab_size) {
  const auto penalty = [](float value) { return value >= -2 && value <= 2; };
  if (auto ok = CheckNumber("temperature", p.temperature, p.temperature >= 0, "0 or more"); !ok) return ok;
  if (auto ok = CheckNumber("top_p", p.top_p, p.top_p > 0 && p.top_p <= 1, "above 0 and at most 1"); !ok) return ok;
  if (auto ok = CheckNumber("min_p", p.min_p, p.min_p >= 0 && p.min_p <= 1, "from 0 to 1"); !ok) return ok;
  if (auto ok = CheckNumber("presence_penalty", p.presence_penalty, penalty(p.presence_penalty), "from -2 to 2"); !ok) {
    return ok;
  }
  if (auto ok = CheckNumber("frequency_penalty", p.frequency_penalty, penalty(p.frequency_penalty), "from -2 to 2");
      !ok) {
    return ok;
  }
  if (auto ok = CheckNumber("repetition_penalty", p.repetition_penalty, p.repetition_penalty > 0, "above 0"); !ok) {
    return ok;
  }
  if (p.top_k < -1) return Refuse("top_k", "top_k = {}: must be -1 or 0 (off) or more.", p.top_k);
  for (const auto& [id, bias] : p.logit_bias) {
    if (id < 0 || id >= vocab_size) {
      return Refuse("logit_bias", "logit_bias: token id {} is out of range, the vocabulary has {} tokens.", id,
                    vocab_size);
    }
    if (!std::isfinite(bias)) return Refuse("logit_bias", "logit_bias: the bias of token {} is not finite.", id);
  }
  for (const auto& word : p.bad_words) {
    if (word.empty()) return Refuse("bad_words", "bad_words: one has no token.");
    if (auto ok = CheckIds("bad_words", word, vocab_size); !ok) return ok;
  }
  return CheckIds("allowed_token_ids", p.allowed_token_ids, vocab_size);
}

}  // namespace

Result<void> CheckRequest(const EngineRequest& request, const RequestBounds& bounds) {
  const SamplingParams& p = request.params;
  const auto prompt = static_cast<int64_t>(request.prompt_token_ids.size());
  if (request.id.empty()) return Refuse("request_id", "The request has no id.");
  if (prompt == 0) return Refuse("prompt", "The prompt is empty: it must have at least one token.");
  if (prompt >= bounds.max_model_len) {
    return Refuse("prompt",
                  "The prompt has {} tokens, but the maximum context length is {} tokens for prompt and output "
                  "together: at most {} tokens of prompt leave room for one.",
                  prompt, bounds.max_model_len, bounds.max_model_len - 1);
  }
  if (auto ok = CheckIds("prompt", request.prompt_token_ids, bounds.vocab_size); !ok) return ok;
  if (p.max_tokens < 1) return Refuse("max_tokens", "max_tokens = {}: must be at least 1.", p.max_tokens);
  if (p.min_tokens < 0 || p.min_tokens > p.max_tokens) {
    return Refuse("min_tokens", "min_tokens = {}: must be from 0 to max_tokens = {}.", p.min_tokens, p.max_tokens);
  }
  if (auto ok = CheckSampling(p, bounds.vocab_size); !ok) return ok;
  if (auto ok = CheckIds("stop_token_ids", p.stop_token_ids, bounds.vocab_size); !ok) return ok;
  for (const std::string& stop : p.stop) {
    if (stop.empty()) return Refuse("stop", "stop: a stop string must not be empty.");
    if (!IsValidUtf8(stop)) return Refuse("stop", "stop: a stop string is not valid UTF-8.");
  }
  if (!p.stop.empty() && !bounds.has_tokenizer) {
    return Refuse("stop", "stop: stop strings need a tokenizer; use stop_token_ids with --skip-tokenizer-init.");
  }
  if (!p.stop.empty() && !p.detokenize) return Refuse("stop", "stop: stop strings need detokenize = true.");
  if (auto ok = CheckLogprobs("logprobs", p.logprobs, bounds); !ok) return ok;
  return CheckLogprobs("prompt_logprobs", p.prompt_logprobs, bounds);
}

}  // namespace weft
