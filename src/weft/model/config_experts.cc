// Latent attention and mixtures of experts in a config.
#include <algorithm>

#include "weft/model/config_fields.h"

namespace weft::internal {
namespace {

using GroupScore = MoeConfig::GroupScore;
using Scoring = MoeConfig::Scoring;

constexpr int64_t kMaxExperts = 1 << 16;

void ParseGroups(const Fields& fields, MoeConfig& moe) {
  for (const char* name : {"n_group", "topk_group"}) {
    if (!fields.Present(name)) fields.Missing(name);
  }
  moe.num_groups = fields.Int("n_group", 1, moe.num_experts, 1);
  if (moe.num_experts % moe.num_groups != 0) {
    fields.Refuse("n_group", moe.num_groups, fmt::format("must divide n_routed_experts = {}", moe.num_experts));
  }
  moe.groups_per_token = fields.Int("topk_group", 1, moe.num_groups, 1);
  const int64_t group = moe.num_experts / moe.num_groups;
  if (moe.group_score == GroupScore::kTop2Sum && moe.num_groups > 1 && group < 2) {
    fields.Refuse("n_group", moe.num_groups, "leaves groups of less than 2 experts");
  }
  if (moe.experts_per_token > moe.groups_per_token * group) {
    fields.Refuse("num_experts_per_tok", moe.experts_per_token,
                  fmt::format("must be at most {}, the experts of topk_group = {} groups", moe.groups_per_token * group,
                              moe.groups_per_token));
  }
}

// What DeepSeek-V2's and V3's own code computes, by topk_method. V2 never normalises the weights, whatever
// norm_topk_prob says.
void ParseDeepseekRouting(const Fields& fields, bool v3, MoeConfig& moe) {
  const std::string method = fields.String("topk_method", v3 ? "noaux_tc" : "greedy");
  const std::string scoring = fields.String("scoring_func", v3 ? "sigmoid" : "softmax");
  const std::string want = v3 ? "sigmoid" : "softmax";
  if (scoring != want) fields.Refuse("scoring_func", scoring, "not supported; with this architecture " + want + " is");
  moe.scoring = v3 ? Scoring::kSigmoid : Scoring::kSoftmax;
  moe.router_f32 = true;
  moe.routed_scaling = fields.Number("routed_scaling_factor", 0.0, 1e6, v3 ? 2.5 : 1.0);
  if (v3) {
    if (method != "noaux_tc") fields.Refuse("topk_method", method, "not supported; with this architecture noaux_tc is");
    moe.norm_topk = fields.Bool("norm_topk_prob", true);
    moe.correction_bias = true;
    moe.group_score = GroupScore::kTop2Sum;
    ParseGroups(fields, moe);
  } else if (method == "group_limited_greedy") {
    moe.group_score = GroupScore::kMax;
    ParseGroups(fields, moe);
  } else if (method != "greedy") {
    fields.Refuse("topk_method", method, "not supported; with this architecture greedy and group_limited_greedy are");
  }
}

void ParseDeepseekExperts(const Fields& fields, ModelConfig& c) {
  if (!fields.Present("n_routed_experts")) fields.Missing("n_routed_experts");
  if (fields.Find("n_routed_experts") == nullptr) return;  // null: dense layers only
  const bool v3 = c.model_type == "deepseek_v3";
  MoeConfig& moe = c.moe.emplace();
  moe.num_experts = fields.Int("n_routed_experts", 1, kMaxExperts);
  moe.experts_per_token = fields.Int("num_experts_per_tok", 1, moe.num_experts);
  moe.expert_ffn = fields.Int("moe_intermediate_size", 1, kMaxWidth);
  moe.shared_ffn = moe.expert_ffn * fields.Int("n_shared_experts", 0, kMaxExperts, 0);
  if (moe.shared_ffn > kMaxWidth) {
    fields.Refuse("n_shared_experts", moe.shared_ffn / moe.expert_ffn,
                  fmt::format("times moe_intermediate_size is above {}", kMaxWidth));
  }
  ParseDeepseekRouting(fields, v3, moe);
  const int64_t first = fields.Int("first_k_dense_replace", 0, kMaxLayers, v3 ? 3 : 0);
  const int64_t every = fields.Int("moe_layer_freq", 1, kMaxLayers, 1);
  for (int64_t i = 0; i < c.num_layers; ++i) c.moe_layers.push_back(i >= first && i % every == 0);
}

void ParseQwenExperts(const Fields& fields, ModelConfig& c) {
  const char* count = fields.Find("num_experts") != nullptr ? "num_experts" : "num_local_experts";
  if (fields.Find(count) == nullptr) fields.Missing("num_experts");
  const int64_t experts = fields.Int(count, 0, kMaxExperts);
  if (experts == 0) return;
  MoeConfig& moe = c.moe.emplace();
  moe.num_experts = experts;
  moe.experts_per_token = fields.Int("num_experts_per_tok", 1, experts);
  moe.expert_ffn = fields.Int("moe_intermediate_size", 1, kMaxWidth);
  moe.norm_topk = fields.Bool("norm_topk_prob", false);
  if (c.model_type == "qwen2_moe") {
    moe.shared_ffn = fields.Int("shared_expert_intermediate_size", 1, kMaxWidth);
    moe.shared_gate = true;
  }
  std::vector<int64_t> dense;
  if (const Json* list = fields.Find("mlp_only_layers")) {
    if (!list->is_array()) fields.Refuse("mlp_only_layers", *list, "must be a list of layers");
    for (const Json& layer : *list) dense.push_back(fields.ToInt("mlp_only_layers", layer, 0, kMaxLayers));
  }
  const int64_t step = fields.Int("decoder_sparse_step", 1, kMaxLayers, 1);
  for (int64_t i = 0; i < c.num_layers; ++i) {
    c.moe_layers.push_back((i + 1) % step == 0 && std::find(dense.begin(), dense.end(), i) == dense.end());
  }
}

}  // namespace

void ParseLatentAttention(const Fields& fields, ModelConfig& c) {
  MlaConfig& mla = c.mla.emplace();
  // Null is a value here: queries straight from the hidden state. What is absent has a default of 1536 in the original.
  if (!fields.Present("q_lora_rank")) fields.Missing("q_lora_rank");
  mla.q_lora_rank = fields.Int("q_lora_rank", 0, kMaxWidth, 0);
  mla.kv_lora_rank = fields.Int("kv_lora_rank", 1, kMaxHeadDim);
  mla.qk_nope_head_dim = fields.Int("qk_nope_head_dim", 1, kMaxHeadDim);
  mla.qk_rope_head_dim = fields.Int("qk_rope_head_dim", 2, kMaxHeadDim);
  mla.v_head_dim = fields.Int("v_head_dim", 1, kMaxHeadDim);
  if (mla.qk_rope_head_dim % 2 != 0) fields.Refuse("qk_rope_head_dim", mla.qk_rope_head_dim, "must be even");
  if (c.num_heads * (mla.qk_nope_head_dim + std::max(mla.qk_rope_head_dim, mla.v_head_dim)) > kMaxWidth) {
    fields.Refuse("num_attention_heads", c.num_heads, fmt::format("times the size of a head is above {}", kMaxWidth));
  }
  c.num_kv_heads = 1;
  c.head_dim = mla.qk_nope_head_dim + mla.qk_rope_head_dim;
  c.rotary_dim = mla.qk_rope_head_dim;
  c.rope_interleaved = c.model_type == "deepseek_v2" || fields.Bool("rope_interleave", true);
}

void ParseExperts(const Fields& fields, ModelConfig& c) {
  if (c.mla) {
    ParseDeepseekExperts(fields, c);
  } else {
    ParseQwenExperts(fields, c);
  }
  if (std::find(c.moe_layers.begin(), c.moe_layers.end(), true) == c.moe_layers.end()) {
    c.moe.reset();
    c.moe_layers.clear();
  }
}

}  // namespace weft::internal
