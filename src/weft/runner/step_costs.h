#pragma once
// What the tokens of a step cost with a given model: arithmetic alone, from its shapes.

#include <cstdint>

#include "weft/cp/deal.h"
#include "weft/model/config.h"

namespace weft {

// FLOP of a token in the linear layers, and of a pair of a query and a key in prefill attention, of all layers and of
// all TP ranks together. `pcp_min_tokens`: --pcp-min-tokens; 0 for auto, where the rates of the machine are not known.
cp::QueryCosts QueryCostsOf(const ModelConfig& config, int64_t pcp_min_tokens);

}  // namespace weft
