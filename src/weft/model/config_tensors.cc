// The tensors that a checkpoint of a config has.
#include "weft/core/error.h"
#include "weft/model/config.h"

namespace weft {

std::vector<ModelTensor> ModelTensors(const ModelConfig& c) {
  using Kind = ModelTensor::Kind;
  std::vector<ModelTensor> tensors;
  const auto add = [&](std::string name, Kind kind, int64_t rows, int64_t cols) {
    tensors.push_back({std::move(name), kind, rows, cols});
  };
  const auto linear = [&](const std::string& name, int64_t out, int64_t in, bool bias) {
    add(name + ".weight", Kind::kMatrix, out, in);
    if (bias) add(name + ".bias", Kind::kBias, 0, out);
  };
  const auto mlp = [&](const std::string& name, int64_t ffn, bool bias) {
    linear(name + ".gate_proj", ffn, c.hidden_size, bias);
    linear(name + ".up_proj", ffn, c.hidden_size, bias);
    linear(name + ".down_proj", c.hidden_size, ffn, bias);
  };
  const auto attention = [&](const std::string& attn) {
    const int64_t q = c.num_heads * c.head_dim;
    if (c.mla) {
      const MlaConfig& mla = *c.mla;
      if (mla.q_lora_rank > 0) {
        linear(attn + "q_a_proj", mla.q_lora_rank, c.hidden_size, c.qkv_bias);
        add(attn + "q_a_layernorm.weight", Kind::kNorm, 0, mla.q_lora_rank);
        linear(attn + "q_b_proj", q, mla.q_lora_rank, false);
      } else {
        linear(attn + "q_proj", q, c.hidden_size, false);
      }
      linear(attn + "kv_a_proj_with_mqa", mla.kv_lora_rank + mla.qk_rope_head_dim, c.hidden_size, c.qkv_bias);
      add(attn + "kv_a_layernorm.weight", Kind::kNorm, 0, mla.kv_lora_rank);
      linear(attn + "kv_b_proj", c.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank, false);
    } else {
      const int64_t kv = c.num_kv_heads * c.head_dim;
      linear(attn + "q_proj", q, c.hidden_size, c.qkv_bias);
      linear(attn + "k_proj", kv, c.hidden_size, c.qkv_bias);
      linear(attn + "v_proj", kv, c.hidden_size, c.qkv_bias);
    }
    linear(attn + "o_proj", c.hidden_size, c.num_heads * c.v_dim(), c.o_bias);
    if (c.qk_norm) {
      add(attn + "q_norm.weight", Kind::kNorm, 0, c.head_dim);
      add(attn + "k_norm.weight", Kind::kNorm, 0, c.head_dim);
    }
  };
  const auto experts = [&](const std::string& name) {
    const MoeConfig& moe = *c.moe;
    linear(name + ".gate", moe.num_experts, c.hidden_size, false);
    if (moe.correction_bias) add(name + ".gate.e_score_correction_bias", Kind::kBias, 0, moe.num_experts);
    for (int64_t expert = 0; expert < moe.num_experts; ++expert) {
      mlp(fmt::format("{}.experts.{}", name, expert), moe.expert_ffn, false);
    }
    if (moe.shared_ffn == 0) return;
    mlp(name + (moe.shared_gate ? ".shared_expert" : ".shared_experts"), moe.shared_ffn, false);
    if (moe.shared_gate) linear(name + ".shared_expert_gate", 1, c.hidden_size, false);
  };

  add("model.embed_tokens.weight", Kind::kEmbedding, c.vocab_size, c.hidden_size);
  for (int64_t i = 0; i < c.num_layers; ++i) {
    const std::string layer = fmt::format("model.layers.{}.", i);
    add(layer + "input_layernorm.weight", Kind::kNorm, 0, c.hidden_size);
    attention(layer + "self_attn.");
    add(layer + "post_attention_layernorm.weight", Kind::kNorm, 0, c.hidden_size);
    if (c.IsMoe(i)) {
      experts(layer + "mlp");
    } else {
      mlp(layer + "mlp", c.intermediate_size, c.mlp_bias);
    }
  }
  add("model.norm.weight", Kind::kNorm, 0, c.hidden_size);
  if (!c.tie_word_embeddings) add("lm_head.weight", Kind::kMatrix, c.vocab_size, c.hidden_size);
  return tensors;
}

}  // namespace weft
