#pragma once
// How the next token is chosen, with vLLM's names, defaults and ranges.

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace weft {

struct SamplingParams {
  float temperature = 1.0f;  // below 1e-5: greedy
  float top_p = 1.0f;        // (0, 1]
  int32_t top_k = 0;         // 0 or -1: off
  float min_p = 0.0f;        // [0, 1]
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  float repetition_penalty = 1.0f;  // > 0
  std::optional<uint64_t> seed;
  std::map<int32_t, float> logit_bias;          // token id -> bias
  std::vector<std::vector<int32_t>> bad_words;  // token ids; the prefix must match the end of the output
  std::vector<int32_t> allowed_token_ids;       // empty: all

  int32_t max_tokens = 16;
  int32_t min_tokens = 0;  // until then neither EOS nor a stop token can be sampled
  bool ignore_eos = false;
  std::vector<int32_t> stop_token_ids;
  std::vector<int32_t> eos_token_ids;  // of the model; filled in by the engine
  std::vector<std::string> stop;
  bool include_stop_str_in_output = false;
  bool skip_special_tokens = true;
  bool spaces_between_special_tokens = true;  // accepted for compatibility
  bool detokenize = true;

  // Number of alternatives to report per token: nothing, 0 (the token itself only), n, or -1 (the whole vocabulary).
  std::optional<int32_t> logprobs;
  std::optional<int32_t> prompt_logprobs;
};

}  // namespace weft
