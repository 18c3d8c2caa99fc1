#pragma once
// Which experts a token goes to, and with what weights.

#include <cstdint>

#include "weft/model/config.h"

namespace weft {

// Of one token: `logits` [num_experts] of the router, `bias` [num_experts] or null (MoeConfig::correction_bias). Writes
// experts_per_token expert numbers, best first (the lower number on a tie), and their weights. `scratch` has room for
// 2 * num_experts floats. Rules: DeepSeek-V2 (arXiv 2405.04434) section 2.2, DeepSeek-V3 (arXiv 2412.19437) section
// 2.1.2, Qwen3-MoE, as transformers has them.
void ChooseExperts(const MoeConfig& config, const float* logits, const float* bias, int32_t* experts, float* weights,
                   float* scratch);

}  // namespace weft
