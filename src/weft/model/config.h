#pragma once
// What a model is, from config.json or from a GGUF's metadata.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

namespace weft {

struct RopeConfig {
  enum class Type { kDefault, kLinear, kLlama3, kYarn };
  Type type = Type::kDefault;
  double theta = 10000.0;
  double factor = 1.0;
  double low_freq_factor = 1.0;   // llama3
  double high_freq_factor = 4.0;  // llama3
  int64_t original_max_position = 0;
  double beta_fast = 32.0;  // yarn
  double beta_slow = 1.0;
  bool truncate = true;                        // yarn: floor and ceil the bounds of the ramp
  std::optional<double> attention_factor;      // yarn: overrides 0.1 ln(factor) + 1
  std::optional<double> mscale, mscale_all_dim;  // yarn, DeepSeek
  // GGUF rope_freqs.weight: divisors of the frequencies [rotary_dim / 2]; replaces llama3's rule.
  std::vector<float> freq_divisors;
};

struct ModelConfig {
  std::string architecture;  // "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"
  std::string model_type;    // "llama", "qwen2", "qwen3"
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_layers = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t rotary_dim = 0;  // = head_dim unless partial_rotary_factor says less
  int64_t vocab_size = 0;
  int64_t max_position_embeddings = 0;
  float rms_norm_eps = 1e-6f;
  bool tie_word_embeddings = false;
  bool qkv_bias = false;
  bool o_bias = false;
  bool mlp_bias = false;
  bool qk_norm = false;
  RopeConfig rope;
  std::optional<int32_t> bos_token_id;
  std::vector<int32_t> eos_token_ids;  // config.json's; generation_config.json's are added where present
};

// Throws weft::Error naming the field, its value and the rule for what is missing, out of range or not supported
// (sliding windows, other activations, unknown architectures ...).
ModelConfig ParseModelConfig(const nlohmann::json& config);

// The inverse frequencies [rotary_dim / 2] in double and the factor on cos and sin.
struct RopeTable {
  std::vector<double> inv_freq;
  double attention_factor = 1.0;
};
RopeTable MakeRopeTable(const RopeConfig& rope, int64_t rotary_dim);

}  // namespace weft
