#include "weft/runner/step_costs.h"

#include "weft/cp/exchange_cost.h"

namespace weft {
namespace {

// Multiplications of one token with the weights of layer `layer`.
int64_t LayerProducts(const ModelConfig& c, int64_t layer) {
  int64_t products = c.num_heads * c.v_dim() * c.hidden_size;  // o_proj
  if (c.mla) {
    const MlaConfig& m = *c.mla;
    const int64_t q = c.num_heads * c.head_dim;
    products += m.q_lora_rank > 0 ? m.q_lora_rank * (c.hidden_size + q) : q * c.hidden_size;
    // The latent, and its expansion to keys and values.
    products += c.hidden_size * (m.kv_lora_rank + m.qk_rope_head_dim) +
                m.kv_lora_rank * c.num_heads * (m.qk_nope_head_dim + m.v_head_dim);
  } else {
    products += c.hidden_size * (c.num_heads + 2 * c.num_kv_heads) * c.head_dim;
  }
  if (!c.IsMoe(layer)) return products + 3 * c.hidden_size * c.intermediate_size;
  const MoeConfig& m = *c.moe;
  return products + c.hidden_size * m.num_experts +
         3 * c.hidden_size * (m.experts_per_token * m.expert_ffn + m.shared_ffn);
}

}  // namespace

cp::QueryCosts QueryCostsOf(const ModelConfig& config, int64_t pcp_min_tokens) {
  double products = 0;
  for (int64_t layer = 0; layer < config.num_layers; ++layer) {
    products += static_cast<double>(LayerProducts(config, layer));
  }
  const auto pair = static_cast<double>(config.num_layers * config.num_heads * (config.head_dim + config.v_dim()));
  return {.per_token = 2 * products,
          .per_pair = 2 * pair,
          .min_tokens_to_cut = pcp_min_tokens > 0 ? pcp_min_tokens : cp::kMinTokensToCut};
}

}  // namespace weft
