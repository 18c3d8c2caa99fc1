#pragma once
#include <cstdint>

#include "weft/api/request.h"

namespace weft {

struct RequestBounds {
  int64_t vocab_size = 0;
  int64_t max_model_len = 0;
  int32_t max_logprobs = 20;  // -1: the whole vocabulary may be asked for
  bool has_tokenizer = true;
};

// The engine's own check of everything that reaches the ranks or the output processing, whatever the edge has checked
// before: kInvalidArgument with `param` naming the field, the message value and rule.
Result<void> CheckRequest(const EngineRequest& request, const RequestBounds& bounds);

}  // namespace weft
