#pragma once
// When a request ends, as far as its tokens tell (stop strings are the text's affair).

#include <cstdint>
#include <optional>

#include "weft/api/request.h"
#include "weft/api/sampling_params.h"

namespace weft {

struct TokenStop {
  FinishReason reason = FinishReason::kStop;
  std::optional<int32_t> stop_token_id;  // the one of stop_token_ids that ended it; none for EOS and lengths
  friend bool operator==(const TokenStop&, const TokenStop&) = default;
};

// Whether `token`, the newest, ends the request. `output_tokens` counts the sampled tokens, this one included, and
// `total_tokens` the prompt's besides. Neither EOS nor a stop token counts before min_tokens; the lengths always do.
std::optional<TokenStop> CheckStop(const SamplingParams& params, int32_t token, int64_t output_tokens,
                                   int64_t total_tokens, int64_t max_model_len);

}  // namespace weft
