#include "weft/scheduler/stop.h"

#include <algorithm>

namespace weft {

std::optional<TokenStop> CheckStop(const SamplingParams& params, int32_t token, int64_t output_tokens,
                                   int64_t total_tokens, int64_t max_model_len) {
  const auto has = [token](const std::vector<int32_t>& ids) {
    return std::find(ids.begin(), ids.end(), token) != ids.end();
  };
  if (output_tokens >= params.min_tokens) {
    if (!params.ignore_eos && has(params.eos_token_ids)) return TokenStop{FinishReason::kStop, std::nullopt};
    if (has(params.stop_token_ids)) return TokenStop{FinishReason::kStop, token};
  }
  if (output_tokens >= params.max_tokens || total_tokens >= max_model_len) {
    return TokenStop{FinishReason::kLength, std::nullopt};
  }
  return std::nullopt;
}

}  // namespace weft
