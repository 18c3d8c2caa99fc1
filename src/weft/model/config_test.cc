#include "weft/model/config.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "weft/model/test_files.h"

namespace weft {
namespace {

using testing::ErrorOf;
using testing::Mentions;
using Json = nlohmann::json;

Json Golden(const std::string& name) {
  return Json::parse(testing::ReadAll(WEFT_TEST_DATA "/models/" + name + "/config.json"));
}

Json With(Json config, const std::string& key, const Json& value) {
  config[key] = value;
  return config;
}
Json Without(Json config, const std::string& key) {
  config.erase(key);
  return config;
}

TEST(ModelConfig, Llama3) {
  const ModelConfig c = ParseModelConfig(Golden("llama_llama3"));
  EXPECT_EQ(c.architecture, "LlamaForCausalLM");
  EXPECT_EQ(c.model_type, "llama");
  EXPECT_EQ(c.hidden_size, 64);
  EXPECT_EQ(c.intermediate_size, 192);
  EXPECT_EQ(c.num_layers, 2);
  EXPECT_EQ(c.num_heads, 4);
  EXPECT_EQ(c.num_kv_heads, 2);
  EXPECT_EQ(c.head_dim, 32);
  EXPECT_EQ(c.rotary_dim, 32);
  EXPECT_EQ(c.vocab_size, 512);
  EXPECT_EQ(c.max_position_embeddings, 131072);
  EXPECT_EQ(c.rms_norm_eps, 1e-5f);
  EXPECT_FALSE(c.tie_word_embeddings || c.qkv_bias || c.o_bias || c.mlp_bias || c.qk_norm);
  EXPECT_EQ(c.rope.type, RopeConfig::Type::kLlama3);
  EXPECT_EQ(c.rope.theta, 500000.0);
  EXPECT_EQ(c.rope.factor, 8.0);
  EXPECT_EQ(c.rope.low_freq_factor, 1.0);
  EXPECT_EQ(c.rope.high_freq_factor, 4.0);
  EXPECT_EQ(c.rope.original_max_position, 256);
  EXPECT_EQ(c.bos_token_id, 1);
  EXPECT_EQ(c.eos_token_ids, std::vector<int32_t>{2});
  EXPECT_EQ(c.dtype, DType::kBF16);
}

TEST(ModelConfig, FamiliesDifferInBiasNormsAndTying) {
  const ModelConfig bias = ParseModelConfig(Golden("llama_bias"));
  EXPECT_TRUE(bias.qkv_bias && bias.o_bias && bias.mlp_bias);
  EXPECT_EQ(bias.head_dim, 16);  // hidden / heads
  EXPECT_TRUE(ParseModelConfig(Golden("llama_tied")).tie_word_embeddings);
  const ModelConfig qwen2 = ParseModelConfig(Golden("qwen2_yarn"));
  EXPECT_TRUE(qwen2.qkv_bias);
  EXPECT_FALSE(qwen2.o_bias || qwen2.mlp_bias || qwen2.qk_norm);
  EXPECT_EQ(qwen2.rope.type, RopeConfig::Type::kYarn);
  EXPECT_EQ(qwen2.rope.factor, 4.0);
  EXPECT_EQ(qwen2.rope.original_max_position, 256);
  const ModelConfig qwen3 = ParseModelConfig(Golden("qwen3"));
  EXPECT_TRUE(qwen3.qk_norm && qwen3.tie_word_embeddings);
  EXPECT_FALSE(qwen3.qkv_bias || qwen3.o_bias);
  EXPECT_EQ(qwen3.head_dim, 32);
  EXPECT_EQ(qwen3.rope.theta, 1e6);
  const ModelConfig biased = ParseModelConfig(With(Golden("qwen3"), "attention_bias", true));
  EXPECT_TRUE(biased.qkv_bias && biased.o_bias);
  const Json mistral = With(With(Golden("llama_tied"), "architectures", {"MistralForCausalLM"}), "sliding_window", {});
  EXPECT_EQ(ParseModelConfig(mistral).model_type, "mistral");
}

TEST(ModelConfig, LatentAttention) {
  const ModelConfig lite = ParseModelConfig(Golden("deepseek_v2_lite"));
  ASSERT_TRUE(lite.mla);
  EXPECT_EQ(lite.mla->q_lora_rank, 0);
  EXPECT_EQ(lite.mla->kv_lora_rank, 32);
  EXPECT_EQ(lite.mla->qk_nope_head_dim, 32);
  EXPECT_EQ(lite.mla->qk_rope_head_dim, 16);
  EXPECT_EQ(lite.mla->v_head_dim, 24);
  EXPECT_EQ(lite.num_kv_heads, 1);
  EXPECT_EQ(lite.head_dim, 48);
  EXPECT_EQ(lite.v_dim(), 24);
  EXPECT_EQ(lite.rotary_dim, 16);
  EXPECT_TRUE(lite.rope_interleaved);
  EXPECT_FALSE(lite.qkv_bias || lite.o_bias || lite.qk_norm);
  // yarn 40: cos and sin times get_mscale(mscale) / get_mscale(mscale_all_dim), scores times the square of the latter.
  const auto mscale = [](double m) { return 0.1 * m * std::log(40.0) + 1.0; };
  EXPECT_NEAR(MakeRopeTable(lite.rope, 16).attention_factor, 1.0, 1e-15);
  EXPECT_NEAR(lite.attention_scale(), mscale(0.707) * mscale(0.707) / std::sqrt(48.0), 1e-15);
  const ModelConfig full = ParseModelConfig(Golden("deepseek_v2_full"));
  EXPECT_EQ(full.mla->q_lora_rank, 48);
  EXPECT_NEAR(MakeRopeTable(full.rope, 16).attention_factor, mscale(1.0) / mscale(0.707), 1e-15);
  EXPECT_NEAR(full.attention_scale(), lite.attention_scale(), 1e-15);
  const ModelConfig v3 = ParseModelConfig(Golden("deepseek_v3"));
  EXPECT_NEAR(v3.attention_scale(), mscale(1.0) * mscale(1.0) / std::sqrt(48.0), 1e-15);
  EXPECT_TRUE(v3.rope_interleaved);
  EXPECT_FALSE(ParseModelConfig(With(Golden("deepseek_v3"), "rope_interleave", false)).rope_interleaved);
  EXPECT_NEAR(ParseModelConfig(With(Golden("deepseek_v3"), "rope_scaling", nullptr)).attention_scale(),
              1 / std::sqrt(48.0), 1e-15);
  // Other families with yarn have no such factor.
  EXPECT_NEAR(ParseModelConfig(Golden("qwen2_yarn")).attention_scale(), 0.25, 1e-15);
  const ModelConfig biased = ParseModelConfig(With(Golden("deepseek_v3"), "attention_bias", true));
  EXPECT_TRUE(biased.qkv_bias && biased.o_bias);
}

TEST(ModelConfig, Experts) {
  const ModelConfig lite = ParseModelConfig(Golden("deepseek_v2_lite"));
  ASSERT_TRUE(lite.moe);
  EXPECT_EQ(lite.moe->num_experts, 12);
  EXPECT_EQ(lite.moe->experts_per_token, 3);
  EXPECT_EQ(lite.moe->expert_ffn, 24);
  EXPECT_EQ(lite.moe->shared_ffn, 48);
  EXPECT_EQ(lite.moe->scoring, MoeConfig::Scoring::kSoftmax);
  EXPECT_EQ(lite.moe->num_groups, 1);
  EXPECT_FALSE(lite.moe->norm_topk || lite.moe->correction_bias || lite.moe->shared_gate);
  EXPECT_TRUE(lite.moe->router_f32);
  EXPECT_EQ(lite.moe_layers, (std::vector<bool>{false, true, true}));
  EXPECT_TRUE(!lite.IsMoe(0) && lite.IsMoe(1));
  EXPECT_FALSE(ParseModelConfig(With(Golden("deepseek_v2_lite"), "norm_topk_prob", true)).moe->norm_topk);

  const ModelConfig full = ParseModelConfig(Golden("deepseek_v2_full"));
  EXPECT_EQ(full.moe->num_groups, 4);
  EXPECT_EQ(full.moe->groups_per_token, 2);
  EXPECT_EQ(full.moe->group_score, MoeConfig::GroupScore::kMax);
  EXPECT_EQ(full.moe->routed_scaling, 4.0);
  // Without group_limited_greedy the groups mean nothing.
  EXPECT_EQ(ParseModelConfig(With(Golden("deepseek_v2_full"), "topk_method", "greedy")).moe->num_groups, 1);

  const ModelConfig v3 = ParseModelConfig(Golden("deepseek_v3"));
  EXPECT_EQ(v3.moe->scoring, MoeConfig::Scoring::kSigmoid);
  EXPECT_EQ(v3.moe->group_score, MoeConfig::GroupScore::kTop2Sum);
  EXPECT_EQ(v3.moe->num_groups, 4);
  EXPECT_EQ(v3.moe->groups_per_token, 2);
  EXPECT_EQ(v3.moe->routed_scaling, 2.5);
  EXPECT_EQ(v3.moe->shared_ffn, 32);
  EXPECT_TRUE(v3.moe->norm_topk && v3.moe->correction_bias && v3.moe->router_f32);
  EXPECT_EQ(ParseModelConfig(With(Golden("deepseek_v3"), "moe_layer_freq", 2)).moe_layers,
            (std::vector<bool>{false, false, true}));
  // Multi-token prediction layers are no part of the model.
  EXPECT_EQ(ParseModelConfig(With(Golden("deepseek_v3"), "num_nextn_predict_layers", 1)).num_layers, 3);

  const ModelConfig qwen3 = ParseModelConfig(Golden("qwen3_moe"));
  EXPECT_EQ(qwen3.moe->num_experts, 8);
  EXPECT_EQ(qwen3.moe->experts_per_token, 2);
  EXPECT_EQ(qwen3.moe->expert_ffn, 48);
  EXPECT_EQ(qwen3.moe->shared_ffn, 0);
  EXPECT_EQ(qwen3.moe->scoring, MoeConfig::Scoring::kSoftmax);
  EXPECT_TRUE(qwen3.moe->norm_topk && qwen3.qk_norm);
  EXPECT_FALSE(qwen3.moe->router_f32 || qwen3.mla || qwen3.rope_interleaved);
  EXPECT_EQ(qwen3.moe_layers, (std::vector<bool>{true, false, true}));
  EXPECT_FALSE(ParseModelConfig(With(Golden("qwen3_moe"), "decoder_sparse_step", 2)).moe);  // layer 1 alone, but dense
  EXPECT_EQ(ParseModelConfig(With(With(Golden("qwen3_moe"), "decoder_sparse_step", 3), "mlp_only_layers", nullptr))
                .moe_layers,
            (std::vector<bool>{false, false, true}));
  EXPECT_FALSE(ParseModelConfig(Without(Golden("qwen3_moe"), "norm_topk_prob")).moe->norm_topk);

  Json qwen2 = With(Golden("qwen3_moe"), "architectures", {"Qwen2MoeForCausalLM"});
  qwen2["shared_expert_intermediate_size"] = 80;
  const ModelConfig shared = ParseModelConfig(qwen2);
  EXPECT_EQ(shared.model_type, "qwen2_moe");
  EXPECT_EQ(shared.moe->shared_ffn, 80);
  EXPECT_TRUE(shared.moe->shared_gate && shared.qkv_bias);
  EXPECT_FALSE(shared.qk_norm || shared.o_bias);
}

TEST(ModelConfig, RefusesWrongExpertsAndLatents) {
  const auto error = [](const Json& config) { return ErrorOf([&] { ParseModelConfig(config); }); };
  const auto expect = [&](const char* base, const char* key, const Json& value, const std::string& rule) {
    const std::string text = error(With(Golden(base), key, value));
    EXPECT_TRUE(Mentions(text, key));
    EXPECT_TRUE(Mentions(text, rule)) << key << " = " << value;
  };
  for (const char* name : {"q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
                           "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group"}) {
    EXPECT_TRUE(Mentions(error(Without(Golden("deepseek_v3"), name)), fmt::format("{} is missing", name)));
  }
  EXPECT_TRUE(Mentions(error(Without(Golden("qwen3_moe"), "num_experts")), "num_experts is missing"));
  expect("deepseek_v3", "qk_rope_head_dim", 15, "even");
  expect("deepseek_v3", "q_lora_rank", -1, "from 0");
  expect("deepseek_v3", "n_group", 3, "must divide n_routed_experts = 16");
  expect("deepseek_v3", "n_group", 16, "less than 2 experts");
  expect("deepseek_v3", "topk_group", 5, "from 1 to 4");
  expect("deepseek_v3", "num_experts_per_tok", 9, "at most 8");
  expect("deepseek_v3", "num_experts_per_tok", 17, "from 1 to 16");
  expect("deepseek_v3", "topk_method", "greedy", "noaux_tc is");
  expect("deepseek_v3", "scoring_func", "softmax", "sigmoid is");
  expect("deepseek_v2_full", "topk_method", "noaux_tc", "group_limited_greedy are");
  expect("deepseek_v2_full", "scoring_func", "sigmoid", "softmax is");
  expect("deepseek_v2_lite", "moe_layer_freq", 0, "from 1");
  expect("qwen3_moe", "mlp_only_layers", 1, "list");
  expect("qwen3_moe", "mlp_only_layers", {"1"}, "integer");
  expect("qwen3_moe", "decoder_sparse_step", 0, "from 1");
  EXPECT_TRUE(Mentions(error(With(Golden("qwen3_moe"), "architectures", {"Qwen2MoeForCausalLM"})),
                       "shared_expert_intermediate_size is missing"));
}

TEST(ModelConfig, Fp8Blocks) {
  const auto with = [](const Json& quantization) {
    return With(Golden("deepseek_v3"), "quantization_config", quantization);
  };
  const Json published = {
      {"activation_scheme", "dynamic"}, {"fmt", "e4m3"}, {"quant_method", "fp8"}, {"weight_block_size", {128, 64}}};
  const ModelConfig c = ParseModelConfig(with(published));
  ASSERT_TRUE(c.fp8_blocks);
  EXPECT_EQ(c.fp8_blocks->rows, 128);
  EXPECT_EQ(c.fp8_blocks->cols, 64);
  EXPECT_FALSE(ParseModelConfig(Golden("deepseek_v3")).fp8_blocks);
  const auto error = [&](const Json& quantization) { return ErrorOf([&] { ParseModelConfig(with(quantization)); }); };
  EXPECT_TRUE(Mentions(error({{"quant_method", "awq"}}), "quantization_config.quant_method = \"awq\""));
  EXPECT_TRUE(Mentions(error({{"quant_method", "compressed-tensors"}}), "compressed-tensors"));
  EXPECT_TRUE(Mentions(error({{"bits", 4}}), "quantization_config = {\"bits\":4}"));
  EXPECT_TRUE(Mentions(error("fp8"), "must be an object"));
  EXPECT_TRUE(Mentions(error(Without(published, "weight_block_size")), "weight_block_size is missing"));
  EXPECT_TRUE(Mentions(error(With(published, "weight_block_size", {128})), "two numbers"));
  EXPECT_TRUE(Mentions(error(With(published, "weight_block_size", {0, 128})), "from 1"));
  EXPECT_TRUE(Mentions(error(With(published, "fmt", "e5m2")), "e4m3 is"));
}

TEST(ModelConfig, Defaults) {
  Json llama = Golden("llama_bias");
  for (const char* name : {"num_key_value_heads", "rope_theta", "rope_scaling", "rms_norm_eps", "hidden_act",
                           "tie_word_embeddings", "attention_bias", "mlp_bias", "max_position_embeddings",
                           "eos_token_id", "bos_token_id", "torch_dtype", "architectures"}) {
    llama.erase(name);
  }
  const ModelConfig c = ParseModelConfig(llama);
  EXPECT_EQ(c.architecture, "LlamaForCausalLM");  // by model_type
  EXPECT_EQ(c.num_kv_heads, 4);
  EXPECT_EQ(c.rope.theta, 10000.0);
  EXPECT_EQ(c.rope.type, RopeConfig::Type::kDefault);
  EXPECT_EQ(c.rms_norm_eps, 1e-6f);
  EXPECT_EQ(c.max_position_embeddings, 2048);
  EXPECT_FALSE(c.qkv_bias || c.mlp_bias || c.tie_word_embeddings);
  EXPECT_TRUE(c.eos_token_ids.empty());
  EXPECT_EQ(c.bos_token_id, std::nullopt);
  EXPECT_EQ(c.dtype, std::nullopt);
  EXPECT_EQ(ParseModelConfig(Without(Golden("qwen3"), "head_dim")).head_dim, 128);
  EXPECT_EQ(ParseModelConfig(With(Golden("qwen3"), "head_dim", nullptr)).head_dim, 16);
  EXPECT_EQ(ParseModelConfig(With(Golden("qwen3"), "partial_rotary_factor", 0.25)).rotary_dim, 8);
}

TEST(ModelConfig, RopeSpellings) {
  const auto same = [](const Json& config, const RopeConfig& want) {
    const RopeConfig got = ParseModelConfig(config).rope;
    EXPECT_EQ(got.type, want.type);
    EXPECT_EQ(got.theta, want.theta);
    EXPECT_EQ(got.factor, want.factor);
    EXPECT_EQ(got.original_max_position, want.original_max_position);
  };
  const Json qwen2 = Golden("qwen2_yarn");
  const RopeConfig want = ParseModelConfig(qwen2).rope;
  Json rope_type = qwen2;
  rope_type["rope_scaling"] = {{"rope_type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 256}};
  same(rope_type, want);
  Json parameters = Without(Without(qwen2, "rope_scaling"), "rope_theta");
  parameters["rope_parameters"] = rope_type["rope_scaling"];
  parameters["rope_parameters"]["rope_theta"] = 1000000.0;
  same(parameters, want);
  // The old spelling wins, as in transformers; a null or empty one does not.
  same(With(qwen2, "rope_parameters", {{"rope_type", "linear"}, {"factor", 2.0}, {"rope_theta", 1e6}}), want);
  same(With(parameters, "rope_scaling", nullptr), want);
  // yarn without original_max_position_embeddings: that of the model. Without factor: the quotient of the two.
  Json quotient = qwen2;
  quotient["rope_scaling"].erase("factor");
  same(quotient, want);
  quotient["rope_scaling"] = {{"type", "yarn"}, {"factor", 4.0}};
  EXPECT_EQ(ParseModelConfig(quotient).rope.original_max_position, 1024);
}

TEST(ModelConfig, RefusesWithFieldValueAndRule) {
  const Json llama = Golden("llama_tied");
  const Json qwen3 = Golden("qwen3");
  const auto error = [](const Json& config) { return ErrorOf([&] { ParseModelConfig(config); }); };
  const auto expect = [&](const Json& base, const char* key, const Json& value, const std::string& rule) {
    const std::string text = error(With(base, key, value));
    EXPECT_TRUE(Mentions(text, key));
    EXPECT_TRUE(Mentions(text, rule)) << key << " = " << value;
  };
  EXPECT_TRUE(Mentions(error(Json::array()), "JSON object"));
  for (const char* name :
       {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"}) {
    EXPECT_TRUE(Mentions(error(Without(llama, name)), fmt::format("{} is missing", name)));
    for (const Json& value : {Json(0), Json(-1), Json(1.5), Json("8"), Json(true), Json(uint64_t{1} << 63),
                              Json(int64_t{1} << 40), Json(1e30), Json::array({8})}) {
      expect(llama, name, value, "must be an integer from 1");
    }
  }
  EXPECT_TRUE(Mentions(error(Without(qwen3, "num_key_value_heads")), "num_key_value_heads is missing"));
  expect(llama, "num_key_value_heads", 3, "must divide num_attention_heads = 4");
  expect(llama, "num_key_value_heads", 8, "must divide");
  expect(llama, "hidden_size", 98, "multiple of num_attention_heads");
  expect(llama, "head_dim", 7, "even");
  expect(llama, "max_position_embeddings", int64_t{1} << 31, "from 1 to 2147483647");
  expect(llama, "rms_norm_eps", -1e-6, "must be a number");
  expect(llama, "rms_norm_eps", "1e-6", "must be a number");
  expect(llama, "rope_theta", 0, "must be a number");
  expect(llama, "hidden_act", "gelu", "silu");
  expect(llama, "tie_word_embeddings", 1, "true or false");
  expect(llama, "architectures", {"GPT2LMHeadModel"}, "LlamaForCausalLM");
  expect(llama, "architectures", "LlamaForCausalLM", "list");
  EXPECT_TRUE(Mentions(error(With(Without(llama, "architectures"), "model_type", "gpt2")), "gpt2"));
  EXPECT_TRUE(Mentions(error(Without(Without(llama, "architectures"), "model_type")), "architectures is missing"));
  expect(llama, "quantization_config", {{"quant_method", "gptq"}}, "gptq");
  expect(llama, "eos_token_id", {2, -1}, "integer");
  expect(llama, "eos_token_id", "2", "integer");
  expect(llama, "bos_token_id", -1, "integer");
  expect(llama, "partial_rotary_factor", 1.5, "from 0 to 1");
  expect(llama, "rope_scaling", 8, "must be an object");
  expect(llama, "rope_parameters", {{"full_attention", {{"rope_theta", 1e6}}}}, "differs between layers");

  const auto rope = [&](const Json& scaling, const std::string& rule) {
    EXPECT_TRUE(Mentions(error(With(llama, "rope_scaling", scaling)), rule)) << scaling;
  };
  rope({{"type", "dynamic"}, {"factor", 2.0}}, "rope_scaling.type = \"dynamic\"");
  rope({{"rope_type", "longrope"}}, "rope_scaling.rope_type = \"longrope\"");
  rope({{"type", "linear"}}, "rope_scaling.factor is missing");
  rope({{"type", "linear"}, {"factor", 0}}, "rope_scaling.factor = 0");
  rope({{"type", "linear"}, {"factor", "x"}}, "rope_scaling.factor");
  rope({{"rope_type", "llama3"}, {"factor", 8}}, "low_freq_factor is missing");
  rope({{"rope_type", "llama3"}, {"factor", 8}, {"low_freq_factor", 4}, {"high_freq_factor", 4}},
       "above low_freq_factor");
  rope({{"type", "yarn"}, {"factor", 4}, {"original_max_position_embeddings", 0}},
       "original_max_position_embeddings = 0");
  rope({{"type", "yarn"}, {"factor", 4}, {"beta_fast", 1}, {"beta_slow", 32}}, "beta_slow");
}

TEST(ModelConfig, SlidingWindowsAreRefusedOnlyWhereUsed) {
  const auto error = [](const Json& config) { return ErrorOf([&] { ParseModelConfig(config); }); };
  Json qwen2 = Golden("qwen2_yarn");
  EXPECT_EQ(error(qwen2), "");  // sliding_window 1024 and use_sliding_window false
  qwen2["use_sliding_window"] = true;
  qwen2["sliding_window"] = 512;
  EXPECT_EQ(error(qwen2), "");  // max_window_layers 28 >= 2 layers
  qwen2["max_window_layers"] = 1;
  EXPECT_TRUE(Mentions(error(qwen2), "sliding"));
  qwen2["sliding_window"] = 1024;  // = max_position_embeddings: hides nothing
  EXPECT_EQ(error(qwen2), "");
  qwen2["layer_types"] = {"full_attention", "sliding_attention"};
  EXPECT_TRUE(Mentions(error(qwen2), "layer_types"));
  qwen2["layer_types"] = {"full_attention", "full_attention"};
  EXPECT_EQ(error(qwen2), "");
  Json mistral = With(Golden("llama_tied"), "architectures", {"MistralForCausalLM"});
  EXPECT_EQ(error(mistral), "");  // the default window of 4096 is all that this model can hold
  mistral["max_position_embeddings"] = 32768;
  EXPECT_TRUE(Mentions(error(With(mistral, "sliding_window", 4096)), "sliding_window = 4096"));
  EXPECT_TRUE(Mentions(error(mistral), "sliding_window"));
  EXPECT_EQ(error(With(mistral, "sliding_window", nullptr)), "");
}

TEST(ModelConfig, EosOfBothFiles) {
  ModelConfig c = ParseModelConfig(With(Golden("llama_tied"), "eos_token_id", {5, 7, 5}));
  EXPECT_EQ(c.eos_token_ids, (std::vector<int32_t>{5, 7}));
  AddGenerationConfig({{"eos_token_id", {7, 9}}}, c);
  AddGenerationConfig({{"eos_token_id", 11}}, c);
  AddGenerationConfig({{"temperature", 0.6}}, c);
  EXPECT_EQ(c.eos_token_ids, (std::vector<int32_t>{5, 7, 9, 11}));
  EXPECT_TRUE(Mentions(ErrorOf([&] { AddGenerationConfig({{"eos_token_id", "x"}}, c); }), "generation_config.json"));
  EXPECT_TRUE(Mentions(ErrorOf([&] { AddGenerationConfig(Json(1), c); }), "generation_config.json"));
}

TEST(ModelConfig, Overrides) {
  Json config = Golden("llama_llama3");
  ApplyConfigOverrides({}, config);
  EXPECT_EQ(config, Golden("llama_llama3"));
  ApplyConfigOverrides({{"rope_scaling", nullptr}, {"rope_theta", 2e6}, {"max_position_embeddings", 77}}, config);
  ModelConfig c = ParseModelConfig(config);
  EXPECT_EQ(c.rope.type, RopeConfig::Type::kDefault);
  EXPECT_EQ(c.rope.theta, 2e6);
  EXPECT_EQ(c.max_position_embeddings, 77);
  EXPECT_TRUE(Mentions(ErrorOf([&] { ApplyConfigOverrides(Json(3), config); }), "hf-overrides"));

  // The same against a file in the new spelling.
  Json newer = Without(Without(Golden("llama_llama3"), "rope_theta"), "rope_scaling");
  newer["rope_parameters"] = Golden("llama_llama3")["rope_scaling"];
  newer["rope_parameters"]["rope_theta"] = 500000.0;
  Json changed = newer;
  ApplyConfigOverrides({{"rope_theta", 2e6}}, changed);
  c = ParseModelConfig(changed);
  EXPECT_EQ(c.rope.theta, 2e6);
  EXPECT_EQ(c.rope.type, RopeConfig::Type::kLlama3);
  changed = newer;
  ApplyConfigOverrides({{"rope_scaling", {{"rope_type", "linear"}, {"factor", 3.0}}}}, changed);
  c = ParseModelConfig(changed);
  EXPECT_EQ(c.rope.theta, 500000.0);
  EXPECT_EQ(c.rope.type, RopeConfig::Type::kLinear);
  changed = newer;
  ApplyConfigOverrides({{"rope_scaling", nullptr}}, changed);
  EXPECT_EQ(ParseModelConfig(changed).rope.type, RopeConfig::Type::kDefault);
  EXPECT_EQ(ParseModelConfig(changed).rope.theta, 500000.0);
}

TEST(ModelConfig, OverridesOfLatentsAndExperts) {
  const auto parsed = [](const char* golden, const Json& overrides) {
    Json config = Golden(golden);
    ApplyConfigOverrides(overrides, config);
    return ParseModelConfig(config);
  };
  // A rope_scaling replaces the whole of the file's.
  const Json yarn = {{"type", "yarn"},        {"factor", 8.0},         {"original_max_position_embeddings", 32},
                     {"mscale", 0.5},         {"mscale_all_dim", 0.9}, {"beta_fast", 16.0},
                     {"attention_factor", 1}, {"beta_slow", 2.0}};
  for (const char* golden : {"deepseek_v2_lite", "deepseek_v2_full", "deepseek_v3", "qwen3_moe"}) {
    const ModelConfig c = parsed(golden, {{"rope_scaling", yarn}, {"rope_theta", 777.0}});
    EXPECT_EQ(c.rope.type, RopeConfig::Type::kYarn);
    EXPECT_EQ(c.rope.theta, 777.0);
    EXPECT_EQ(c.rope.factor, 8.0);
    EXPECT_EQ(c.rope.original_max_position, 32);
    EXPECT_EQ(c.rope.mscale, 0.5);
    EXPECT_EQ(c.rope.beta_fast, 16.0);
    EXPECT_EQ(c.rope.attention_factor, 1.0);
    // mscale_all_dim is on DeepSeek's scores only.
    const double mscale = c.mla ? 0.1 * 0.9 * std::log(8.0) + 1.0 : 1.0;
    EXPECT_NEAR(c.attention_scale() * std::sqrt(static_cast<double>(c.head_dim)), mscale * mscale, 1e-12);
    const ModelConfig none = parsed(golden, {{"rope_scaling", nullptr}});
    EXPECT_EQ(none.rope.type, RopeConfig::Type::kDefault);
    EXPECT_NEAR(none.attention_scale() * std::sqrt(static_cast<double>(none.head_dim)), 1.0, 1e-12);
    EXPECT_EQ(parsed(golden, {{"num_experts_per_tok", 1}}).moe->experts_per_token, 1);
  }
  const ModelConfig v3 = parsed("deepseek_v3", {{"n_group", 1}, {"topk_group", 1}, {"routed_scaling_factor", 3.5}});
  EXPECT_EQ(v3.moe->num_groups, 1);
  EXPECT_EQ(v3.moe->routed_scaling, 3.5);
  const ModelConfig fp8 =
      parsed("qwen3_moe", {{"quantization_config", {{"quant_method", "fp8"}, {"weight_block_size", {128, 64}}}}});
  ASSERT_TRUE(fp8.fp8_blocks);
  EXPECT_EQ(fp8.fp8_blocks->cols, 64);
}

void ExpectNear(const std::vector<double>& got, const std::vector<double>& want) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) EXPECT_NEAR(got[i], want[i], 1e-13 * std::abs(want[i])) << "frequency " << i;
}

// Computed outside this program from the formulas of the papers.
TEST(RopeTable, KnownNumbers) {
  const RopeTable llama = MakeRopeTable(ParseModelConfig(Golden("llama_llama3")).rope, 32);
  ExpectNear(llama.inv_freq,
             {1.0, 0.44036660267178046, 0.19392274474868576, 0.0724300351649636, 0.010538232746455323,
              0.002070055010124306, 0.0009115830921521386, 0.0004014307493440739, 0.00017677669529663688,
              7.78465527393245e-05, 3.428102195952591e-05, 1.509621717643313e-05, 6.647869871181236e-06,
              2.9274998701761677e-06, 1.2891731721515574e-06, 5.677088100759837e-07});
  EXPECT_EQ(llama.attention_factor, 1.0);
  const RopeTable yarn = MakeRopeTable(ParseModelConfig(Golden("qwen2_yarn")).rope, 16);
  ExpectNear(yarn.inv_freq, {1.0, 0.1333709557529192, 0.015811388300841896, 0.0014058533129758727, 0.00025,
                             4.445698525097307e-05, 7.905694150420949e-06, 1.4058533129758728e-06});
  EXPECT_NEAR(yarn.attention_factor, 1.138629436111989, 1e-15);
}

std::vector<double> Plain(double theta, int64_t dim) {
  std::vector<double> out;
  for (int64_t i = 0; i < dim; i += 2) {
    out.push_back(std::exp(-std::log(theta) * static_cast<double>(i) / static_cast<double>(dim)));
  }
  return out;
}

// Each rule written another way, on random parameters.
TEST(RopeTable, RandomParameters) {
  const auto seed = std::random_device()();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  std::mt19937 random(seed);
  const auto uniform = [&](double a, double b) { return std::uniform_real_distribution<double>(a, b)(random); };
  for (int round = 0; round < 200; ++round) {
    RopeConfig rope;
    const int64_t dim = 2 * std::uniform_int_distribution<int64_t>(1, 80)(random);
    rope.theta = std::exp(uniform(std::log(100.0), std::log(1e8)));
    rope.factor = uniform(1.0, 64.0);
    rope.original_max_position = std::uniform_int_distribution<int64_t>(64, 40000)(random);
    const auto old = static_cast<double>(rope.original_max_position);
    const std::vector<double> plain = Plain(rope.theta, dim);

    ExpectNear(MakeRopeTable(rope, dim).inv_freq, plain);
    rope.type = RopeConfig::Type::kLinear;
    std::vector<double> want = plain;
    for (double& f : want) f /= rope.factor;
    ExpectNear(MakeRopeTable(rope, dim).inv_freq, want);

    rope.type = RopeConfig::Type::kLlama3;
    rope.low_freq_factor = uniform(0.5, 2.0);
    rope.high_freq_factor = rope.low_freq_factor + uniform(0.5, 6.0);
    std::vector<float> divisors;
    for (size_t i = 0; i < want.size(); ++i) {
      const double turns = old * plain[i] / (2 * M_PI);  // over the old context
      const double keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor);
      want[i] = turns < rope.low_freq_factor    ? plain[i] / rope.factor
                : turns > rope.high_freq_factor ? plain[i]
                                                : plain[i] / rope.factor * (1 - keep) + plain[i] * keep;
      divisors.push_back(static_cast<float>(plain[i] / want[i]));
    }
    const RopeTable llama3 = MakeRopeTable(rope, dim);
    // Where `turns` is a hair from a bound, the rules meet: no case distinction is visible.
    ASSERT_EQ(llama3.inv_freq.size(), want.size());
    for (size_t i = 0; i < want.size(); ++i) EXPECT_NEAR(llama3.inv_freq[i], want[i], 1e-11 * want[i]) << i;
    EXPECT_EQ(llama3.attention_factor, 1.0);

    // The divisors of a GGUF say the same in f32, and stand alone whatever the type.
    RopeConfig gguf = rope;
    gguf.freq_divisors = divisors;
    for (const auto type : {RopeConfig::Type::kLlama3, RopeConfig::Type::kDefault}) {
      gguf.type = type;
      const RopeTable divided = MakeRopeTable(gguf, dim);
      for (size_t i = 0; i < want.size(); ++i) EXPECT_NEAR(divided.inv_freq[i], want[i], 1.2e-7 * want[i]) << i;
    }

    rope.type = RopeConfig::Type::kYarn;
    rope.truncate = round % 2 == 0;
    rope.beta_fast = uniform(8.0, 64.0);
    rope.beta_slow = uniform(0.5, 4.0);
    // The dimension (as a pair's index times 2 / 2) where a frequency turns `n` times over the old context:
    // old * theta^(-2 i / dim) / 2 pi = n.
    const auto index_of = [&](double n) {
      return 0.5 * static_cast<double>(dim) * (std::log(old) - std::log(2 * M_PI * n)) / std::log(rope.theta);
    };
    double low = index_of(rope.beta_fast), high = index_of(rope.beta_slow);
    if (rope.truncate) low = std::floor(low), high = std::ceil(high);
    low = low < 0 ? 0 : low;
    high = high > static_cast<double>(dim - 1) ? static_cast<double>(dim - 1) : high;
    if (low < high) {  // a degenerate ramp is another test's
      for (size_t i = 0; i < want.size(); ++i) {
        const double x = (static_cast<double>(i) - low) / (high - low);
        const double ramp = x < 0 ? 0 : x > 1 ? 1 : x;
        want[i] = plain[i] * (1 - ramp * (1 - 1 / rope.factor));
      }
      const RopeTable yarn = MakeRopeTable(rope, dim);
      for (size_t i = 0; i < want.size(); ++i) EXPECT_NEAR(yarn.inv_freq[i], want[i], 1e-10 * want[i]) << i;
      EXPECT_NEAR(yarn.attention_factor, 1 + std::log(rope.factor) / 10, 1e-14);
    }
  }
}

TEST(RopeTable, YarnAttentionFactor) {
  RopeConfig rope;
  rope.type = RopeConfig::Type::kYarn;
  rope.theta = 1e4;
  rope.factor = 40.0;
  rope.original_max_position = 4096;
  const double log = std::log(40.0);
  const auto factor = [&] { return MakeRopeTable(rope, 64).attention_factor; };
  EXPECT_NEAR(factor(), 0.1 * log + 1, 1e-15);
  rope.mscale = 0.7;  // alone: no effect
  EXPECT_NEAR(factor(), 0.1 * log + 1, 1e-15);
  rope.mscale_all_dim = 1.3;
  EXPECT_NEAR(factor(), (0.07 * log + 1) / (0.13 * log + 1), 1e-15);
  rope.mscale_all_dim = 0.7;
  EXPECT_EQ(factor(), 1.0);
  rope.mscale_all_dim = 0.0;  // as if not given
  EXPECT_NEAR(factor(), 0.1 * log + 1, 1e-15);
  rope.attention_factor = 1.25;
  EXPECT_EQ(factor(), 1.25);
  rope.attention_factor.reset();
  rope.factor = 0.5;
  EXPECT_EQ(factor(), 1.0);
}

TEST(RopeTable, YarnRampWithoutWidth) {
  RopeConfig rope;
  rope.type = RopeConfig::Type::kYarn;
  rope.theta = 1e4;
  rope.factor = 4.0;
  rope.original_max_position = 4;  // both bounds fall below 0: everything but the first frequency is above the ramp...
  rope.beta_fast = 32;
  rope.beta_slow = 0.6;  // ... whose upper end the ceiling puts at 0
  const RopeTable table = MakeRopeTable(rope, 8);
  const std::vector<double> plain = Plain(1e4, 8);
  ExpectNear(table.inv_freq, {plain[0], plain[1] / 4, plain[2] / 4, plain[3] / 4});
}

}  // namespace
}  // namespace weft
