#pragma once
// What a model is, from config.json or from a GGUF's metadata.

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "weft/core/dtype.h"

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
  bool truncate = true;                          // yarn: floor and ceil the bounds of the ramp
  std::optional<double> attention_factor;        // yarn: overrides 0.1 ln(factor) + 1
  std::optional<double> mscale, mscale_all_dim;  // yarn, DeepSeek
  // GGUF rope_freqs.weight: divisors of the frequencies [rotary_dim / 2]; replaces llama3's rule.
  std::vector<float> freq_divisors;
};

// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values of all heads are made from one latent of
// kv_lora_rank values a token; beside it one key of qk_rope_head_dim values carries the positions for all heads.
struct MlaConfig {
  int64_t q_lora_rank = 0;  // 0: queries straight from the hidden state
  int64_t kv_lora_rank = 0;
  int64_t qk_nope_head_dim = 0;
  int64_t qk_rope_head_dim = 0;
  int64_t v_head_dim = 0;
  // q_a_layernorm and kv_a_layernorm use this whatever rms_norm_eps says.
  static constexpr float kNormEps = 1e-6f;
};

// How the mixture-of-experts layers choose and weigh their experts.
struct MoeConfig {
  enum class Scoring { kSoftmax, kSigmoid };
  // Of a group of experts: its best score, or the sum of its two best (of the biased scores, with correction_bias).
  enum class GroupScore { kMax, kTop2Sum };
  int64_t num_experts = 0;
  int64_t experts_per_token = 0;
  int64_t expert_ffn = 0;  // moe_intermediate_size
  int64_t shared_ffn = 0;  // width of the expert that every token goes through; 0: none
  Scoring scoring = Scoring::kSoftmax;
  // Only experts of the groups_per_token best of num_groups equal groups (neighbouring experts) are chosen from.
  int64_t num_groups = 1;
  int64_t groups_per_token = 1;
  GroupScore group_score = GroupScore::kMax;
  bool correction_bias = false;  // added to the scores for choosing only, never to the weights
  bool norm_topk = false;        // weights are divided by their sum (+ 1e-20)
  double routed_scaling = 1.0;   // on the weights, after that
  bool router_f32 = false;       // the router is computed in f32 whatever the model's dtype
  bool shared_gate = false;      // Qwen2-MoE: the shared expert's output times sigmoid(shared_gate . x)
};

// Weights stored as FP8 (e4m3) with one scale (NAME_scale_inv) for every block of rows x columns.
struct Fp8Blocks {
  int64_t rows = 0;
  int64_t cols = 0;
};

struct ModelConfig {
  // "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen2MoeForCausalLM",
  // "Qwen3MoeForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"
  std::string architecture;
  std::string
      model_type;  // "llama", "mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;  // of the dense MLPs
  int64_t num_layers = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;  // 1 with MLA: the latent
  int64_t head_dim = 0;      // of queries and keys; with MLA qk_nope_head_dim + qk_rope_head_dim
  // What rope turns of a head: = head_dim unless partial_rotary_factor says less; with MLA qk_rope_head_dim, the last
  // ones of a query head.
  int64_t rotary_dim = 0;
  bool rope_interleaved = false;  // pairs (2d, 2d + 1) instead of (d, d + rotary_dim / 2)
  int64_t vocab_size = 0;
  int64_t max_position_embeddings = 0;
  float rms_norm_eps = 1e-6f;
  bool tie_word_embeddings = false;
  bool qkv_bias = false;
  bool o_bias = false;
  bool mlp_bias = false;
  bool qk_norm = false;
  std::optional<MlaConfig> mla;
  std::optional<MoeConfig> moe;
  std::vector<bool> moe_layers;  // [num_layers] where `moe` is set: which layers have experts instead of a dense MLP
  RopeConfig rope;
  std::optional<int32_t> bos_token_id;
  std::vector<int32_t> eos_token_ids;  // config.json's; generation_config.json's are added where present
  std::optional<Fp8Blocks> fp8_blocks;
  std::optional<DType> dtype;  // torch_dtype or dtype: what the weights were trained or saved in

  bool IsMoe(int64_t layer) const { return moe && moe_layers.at(static_cast<size_t>(layer)); }
  // Values of one head in the attention's output, o_proj's input.
  int64_t v_dim() const { return mla ? mla->v_head_dim : head_dim; }
  // The factor on the scores: head_dim^-0.5, and with MLA and yarn times (0.1 mscale_all_dim ln(factor) + 1)^2.
  double attention_scale() const;
};

// Throws weft::Error naming the field, its value and the rule for what is missing, out of range or not supported
// (sliding windows, other activations, unknown architectures, quantisations ...). Reads both spellings of rope:
// rope_theta with rope_scaling {type | rope_type, ...}, and rope_parameters {rope_theta, rope_type, ...}; rope_scaling
// goes first. A field that is absent takes the default of the model's own configuration class where that has one worth
// having.
ModelConfig ParseModelConfig(const nlohmann::json& config);

// Replaces fields of `config` by those of `overrides` (a JSON object, or null for none). A rope_theta or rope_scaling
// given there also wins over a rope_parameters of the file. Throws weft::Error if `overrides` is not an object.
void ApplyConfigOverrides(const nlohmann::json& overrides, nlohmann::json& config);

// Adds generation_config.json's eos_token_id (a number, a list or absent). Throws weft::Error.
void AddGenerationConfig(const nlohmann::json& generation_config, ModelConfig& config);

// A tensor that a checkpoint of this config has, by its Hugging Face name.
struct ModelTensor {
  enum class Kind { kEmbedding, kMatrix, kBias, kNorm };
  std::string name;
  Kind kind = Kind::kMatrix;
  int64_t rows = 0;  // 0: a vector
  int64_t cols = 0;
  int64_t elements() const { return rows == 0 ? cols : rows * cols; }
};
// All of them, embedding first, then layer by layer, the final norm, and the LM head unless it is tied; not those of
// multi-token prediction layers, which checkpoints of DeepSeek-V3 have besides, nor the scales of FP8 ones.
std::vector<ModelTensor> ModelTensors(const ModelConfig& config);

// The inverse frequencies [rotary_dim / 2] in double and the factor on both cos and sin. The same table is used at all
// lengths, below original_max_position too. Formulas: the RoPE, Llama 3.1 and YaRN (arXiv 2309.00071) rules as
// transformers' modeling_rope_utils states them. rotary_dim must be even and positive.
struct RopeTable {
  std::vector<double> inv_freq;
  double attention_factor = 1.0;
};
RopeTable MakeRopeTable(const RopeConfig& rope, int64_t rotary_dim);

}  // namespace weft
