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

// How far the choice is from another one: the least distance between a score that was chosen (an expert's, or a
// group's) and the best one that was not; infinity where there is nothing else to choose. Rounding of that size may
// decide. The arguments are those of ChooseExperts.
float ChoiceMargin(const MoeConfig& config, const float* logits, const float* bias, float* scratch);

}  // namespace weft
