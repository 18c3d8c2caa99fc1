#pragma once
// What goes into the engine and what comes out of it.

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "weft/api/sampling_params.h"
#include "weft/core/error.h"

namespace weft {

struct TokenLogprob {
  int32_t token = 0;
  float logprob = 0.0f;
  int32_t rank = 0;  // 1 = most likely
};

// The log-probabilities at one position: the token that stands there, then the most likely ones, best first.
struct PositionLogprobs {
  TokenLogprob chosen;
  std::vector<TokenLogprob> top;
};

struct EngineRequest {
  std::string id;                         // unique among the live ones
  std::vector<int32_t> prompt_token_ids;  // at least one
  SamplingParams params;
  int32_t priority = 0;  // lower is served first
  // Prefix cache entries may be shared only between requests with the same salt.
  std::string cache_salt;
};

enum class FinishReason { kStop, kLength, kAbort, kError };
constexpr const char* NameOf(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kAbort:
      return "abort";
    case FinishReason::kError:
      return "error";
  }
  return "error";
}

// What is new since the previous output of the same request. The last one has finish_reason set.
struct RequestOutput {
  std::string id;
  std::string text;  // whole UTF-8 characters; held back while it could be the beginning of a stop string
  std::vector<int32_t> token_ids;
  std::vector<PositionLogprobs> logprobs;  // one per token id when asked for
  // In the first output when asked for: entry i is about prompt token i; entry 0 has no value (it has no predecessor).
  std::optional<std::vector<std::optional<PositionLogprobs>>> prompt_logprobs;
  std::optional<FinishReason> finish_reason;
  // The stop string or stop token id that ended it; empty for EOS.
  std::variant<std::monostate, std::string, int32_t> stop_reason;
  std::string error;  // with kError
  ErrorKind error_kind = ErrorKind::kInternal;

  // Totals so far.
  int32_t prompt_tokens = 0;
  int32_t cached_tokens = 0;  // of the prompt, found in the prefix cache
  int32_t completion_tokens = 0;
};

// Called from the engine's thread, in order, never again after the output that has finish_reason. Must not block.
using OutputSink = std::function<void(RequestOutput&&)>;

}  // namespace weft
