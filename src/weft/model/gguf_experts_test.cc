// GGUF files of mixtures of experts and latent attention against their Hugging Face form.
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <random>

#include "weft/model/checkpoint.h"
#include "weft/model/convert.h"
#include "weft/model/test_gguf.h"

namespace weft {
namespace {

using testing::ErrorOf;
using testing::GgufWriter;
using testing::Mentions;
using Json = nlohmann::json;

constexpr uint32_t kF32 = 0, kQ8 = 8, kBF16 = 30;

enum class Family { kV2Lite, kV2, kV3, kQwen2, kQwen3 };
enum class Style {
  kOld,  // attn_kv_b; no keys for groups and gates that were added later
  kNew   // attn_k_b and attn_v_b, key_length_mla
};

struct Case {
  Family family;
  Style style;
  uint32_t type;
  bool fused = false;  // gate and up of the experts in one tensor
};

// Every size differs from the others that it could be taken for; blocks of 32 divide what is quantised.
Json HfConfig(Family family) {
  Json config = {{"hidden_size", 64},
                 {"intermediate_size", 160},
                 {"num_hidden_layers", 3},
                 {"num_attention_heads", 2},
                 {"vocab_size", 10},
                 {"max_position_embeddings", 4096},
                 {"rms_norm_eps", 1e-6},
                 {"rope_theta", 1e6},
                 {"eos_token_id", {3}},
                 {"num_experts_per_tok", 2},
                 {"moe_intermediate_size", 96},
                 {"tie_word_embeddings", false},
                 {"bos_token_id", 1},
                 {"norm_topk_prob", false}};
  if (family == Family::kQwen2 || family == Family::kQwen3) {
    const bool qwen2 = family == Family::kQwen2;
    config.update({{"architectures", {qwen2 ? "Qwen2MoeForCausalLM" : "Qwen3MoeForCausalLM"}},
                   {"num_key_value_heads", 1},
                   {"head_dim", qwen2 ? 32 : 128},
                   {"num_experts", 6}});
    if (qwen2) config["shared_expert_intermediate_size"] = 32;
    if (!qwen2) config["norm_topk_prob"] = true;
    return config;
  }
  const bool v3 = family == Family::kV3, lite = family == Family::kV2Lite;
  config.update({{"architectures", {v3 ? "DeepseekV3ForCausalLM" : "DeepseekV2ForCausalLM"}},
                 {"num_key_value_heads", 2},
                 {"q_lora_rank", lite ? Json(nullptr) : Json(256)},
                 {"kv_lora_rank", 192},
                 {"qk_nope_head_dim", 32},
                 {"qk_rope_head_dim", 64},
                 {"v_head_dim", 128},
                 {"n_routed_experts", 8},
                 {"n_shared_experts", 2},
                 {"first_k_dense_replace", 1},
                 {"routed_scaling_factor", v3     ? 2.5
                                           : lite ? 1.0
                                                  : 16.0},
                 {"scoring_func", v3 ? "sigmoid" : "softmax"},
                 {"topk_method", v3     ? "noaux_tc"
                                 : lite ? "greedy"
                                        : "group_limited_greedy"},
                 {"n_group", lite ? 1 : 4},
                 {"topk_group", lite ? 1 : 3},
                 {"norm_topk_prob", v3}});
  if (family != Family::kV2) {
    const double mscale = lite ? 0.707 : 1.0;
    config["rope_scaling"] = {
        {"type", "yarn"},   {"factor", 40.0},           {"original_max_position_embeddings", 1024},
        {"mscale", mscale}, {"mscale_all_dim", mscale}, {"beta_fast", 32.0},
        {"beta_slow", 1.0}};
  }
  return config;
}

// Random tensors of a model, and the same in a GGUF file. Where a format rounds, `expected` has what it stored.
class Twin {
 public:
  Twin(const Case& c, uint32_t seed)
      : case_(c), random_(seed), hf_(HfConfig(c.family)), config_(ParseModelConfig(hf_)) {
    Metadata();
    for (const ModelTensor& tensor : ModelTensors(config_)) {
      std::vector<float>& values = expected[tensor.name];
      values.resize(static_cast<size_t>(tensor.elements()));
      for (float& value : values) value = std::normal_distribution<float>()(random_);
    }
    const int64_t hidden = config_.hidden_size;
    Whole("model.embed_tokens.weight", "token_embd.weight", 10, hidden);
    Whole("lm_head.weight", "output.weight", 10, hidden);
    Vector("model.norm.weight", "output_norm.weight", hidden);
    for (int64_t i = 0; i < config_.num_layers; ++i) Layer(i);
  }

  std::unique_ptr<Checkpoint> Open(const Json& overrides = {}) const {
    const testing::TempFolder folder;  // a mapping outlives the name of its file
    return OpenCheckpoint(folder.Write("twin.gguf", writer.Bytes()), overrides);
  }
  const ModelConfig& config() const { return config_; }

  GgufWriter writer;
  std::map<std::string, std::vector<float>> expected;  // by Hugging Face's names

 private:
  bool latent() const { return config_.mla.has_value(); }

  void Metadata() {
    const std::string arch = latent() ? "deepseek2" : case_.family == Family::kQwen2 ? "qwen2moe" : "qwen3moe";
    const auto u32 = [&](const char* key, int64_t value) {
      writer.U32(fmt::format("{}.{}", arch, key), static_cast<uint32_t>(value));
    };
    const bool old = case_.style == Style::kOld;
    writer.String("general.architecture", arch);
    u32("embedding_length", config_.hidden_size);
    u32("feed_forward_length", config_.intermediate_size);
    u32("block_count", config_.num_layers);
    u32("attention.head_count", config_.num_heads);
    u32("context_length", 4096);
    writer.F32(arch + ".attention.layer_norm_rms_epsilon", 1e-6f);
    writer.F32(arch + ".rope.freq_base", 1e6f);
    writer.U32("tokenizer.ggml.bos_token_id", 1);
    writer.U32("tokenizer.ggml.eos_token_id", 3);
    const MoeConfig& moe = *config_.moe;
    u32("expert_count", moe.num_experts);
    u32("expert_used_count", moe.experts_per_token);
    u32("expert_feed_forward_length", moe.expert_ffn);
    if (!latent()) {
      u32("attention.head_count_kv", 1);
      u32("attention.key_length", config_.head_dim);
      u32("attention.value_length", config_.head_dim);
      if (moe.shared_ffn > 0) u32("expert_shared_feed_forward_length", moe.shared_ffn);
      return;
    }
    const MlaConfig& mla = *config_.mla;
    u32("attention.head_count_kv", old ? config_.num_heads : 1);
    u32("attention.key_length", old ? config_.head_dim : mla.kv_lora_rank + mla.qk_rope_head_dim);
    u32("attention.value_length", old ? mla.v_head_dim : mla.kv_lora_rank);
    if (!old) u32("attention.key_length_mla", config_.head_dim);
    if (!old) u32("attention.value_length_mla", mla.v_head_dim);
    // Old files of V2-Lite have the key although the model has no such matrix.
    if (mla.q_lora_rank > 0 || old) u32("attention.q_lora_rank", mla.q_lora_rank > 0 ? mla.q_lora_rank : 1536);
    u32("attention.kv_lora_rank", mla.kv_lora_rank);
    u32("rope.dimension_count", mla.qk_rope_head_dim);
    u32("expert_shared_count", 2);
    u32("leading_dense_block_count", 1);
    writer.F32(arch + ".expert_weights_scale", static_cast<float>(moe.routed_scaling));
    const bool sigmoid = moe.scoring == MoeConfig::Scoring::kSigmoid;
    if (sigmoid || !old) u32("expert_gating_func", sigmoid ? 2 : 1);
    if (sigmoid) writer.Bool(arch + ".expert_weights_norm", true);
    if (!old) {
      u32("expert_group_count", moe.num_groups);
      u32("expert_group_used_count", moe.groups_per_token);
    }
    if (config_.rope.type != RopeConfig::Type::kYarn) return;
    writer.String(arch + ".rope.scaling.type", "yarn");
    writer.F32(arch + ".rope.scaling.factor", 40.0f);
    u32("rope.scaling.original_context_length", 1024);
    writer.F32(arch + ".rope.scaling.yarn_log_multiplier", static_cast<float>(0.1 * *config_.rope.mscale_all_dim));
  }

  // What becomes of the elements of a tensor of the file, in its order: each is one of Hugging Face's.
  using Source = std::vector<float*>;

  Source Rows(const std::string& name, int64_t row0, int64_t rows, int64_t cols) {
    Source source;
    std::vector<float>& values = expected.at(name);
    for (int64_t i = row0 * cols; i < (row0 + rows) * cols; ++i) source.push_back(&values.at(static_cast<size_t>(i)));
    return source;
  }

  void Write(const std::string& name, const std::vector<int64_t>& dims, uint32_t type, const Source& source) {
    std::string bytes;
    for (size_t i = 0; type != kQ8 && i < source.size(); ++i) {
      if (type == kBF16) {
        const bf16 rounded = ToBf16(*source[i]);
        testing::Append(bytes, rounded.bits);
        *source[i] = ToFloat(rounded);
      } else {
        testing::Append(bytes, *source[i]);
      }
    }
    for (size_t block = 0; type == kQ8 && block < source.size(); block += 32) {  // half d, 32 x int8
      const auto d = static_cast<uint16_t>(0x1c00 + random_() % 0x1000);         // 2^-8 to 2^-4
      testing::Append(bytes, d);
      for (size_t i = block; i < block + 32; ++i) {
        const auto q = static_cast<int8_t>(std::clamp(std::round(*source[i] / HalfToFloatFast(d)), -127.0f, 127.0f));
        testing::Append(bytes, q);
        *source[i] = static_cast<float>(q) * HalfToFloatFast(d);
      }
    }
    writer.Tensor(name, {dims.begin(), dims.end()}, type, bytes);
  }

  void Whole(const std::string& name, const std::string& gguf, int64_t rows, int64_t cols) {
    Write(gguf, {cols, rows}, case_.type, Rows(name, 0, rows, cols));
  }
  void Vector(const std::string& name, const std::string& gguf, int64_t n) {
    Write(gguf, {n}, kF32, Rows(name, 0, 1, n));
  }

  void Layer(int64_t i) {
    const std::string hf = fmt::format("model.layers.{}.", i), gguf = fmt::format("blk.{}.", i);
    const int64_t hidden = config_.hidden_size, heads = config_.num_heads;
    const auto whole = [&](const char* from, const char* to, int64_t rows, int64_t cols) {
      Whole(fmt::format("{}{}.weight", hf, from), fmt::format("{}{}.weight", gguf, to), rows, cols);
    };
    const auto vector = [&](const char* from, const char* to, int64_t n) {
      Vector(fmt::format("{}{}", hf, from), fmt::format("{}{}", gguf, to), n);
    };
    vector("input_layernorm.weight", "attn_norm.weight", hidden);
    vector("post_attention_layernorm.weight", "ffn_norm.weight", hidden);
    if (latent()) {
      const MlaConfig& mla = *config_.mla;
      if (mla.q_lora_rank > 0) {
        whole("self_attn.q_a_proj", "attn_q_a", mla.q_lora_rank, hidden);
        vector("self_attn.q_a_layernorm.weight", "attn_q_a_norm.weight", mla.q_lora_rank);
        whole("self_attn.q_b_proj", "attn_q_b", heads * config_.head_dim, mla.q_lora_rank);
      } else {
        whole("self_attn.q_proj", "attn_q", heads * config_.head_dim, hidden);
      }
      whole("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa", mla.kv_lora_rank + mla.qk_rope_head_dim, hidden);
      vector("self_attn.kv_a_layernorm.weight", "attn_kv_a_norm.weight", mla.kv_lora_rank);
      KvB(hf + "self_attn.kv_b_proj.weight", gguf, mla);
      whole("self_attn.o_proj", "attn_output", hidden, heads * mla.v_head_dim);
    } else {
      const int64_t dim = config_.head_dim;
      for (const auto& [from, to, rows] :
           {std::tuple{"q_proj", "attn_q", heads * dim}, {"k_proj", "attn_k", dim}, {"v_proj", "attn_v", dim}}) {
        whole(fmt::format("self_attn.{}", from).c_str(), to, rows, hidden);
        if (!config_.qkv_bias) continue;
        vector(fmt::format("self_attn.{}.bias", from).c_str(), fmt::format("{}.bias", to).c_str(), rows);
      }
      whole("self_attn.o_proj", "attn_output", hidden, heads * dim);
      if (config_.qk_norm) {
        vector("self_attn.q_norm.weight", "attn_q_norm.weight", dim);
        vector("self_attn.k_norm.weight", "attn_k_norm.weight", dim);
      }
    }
    if (!config_.IsMoe(i)) {
      whole("mlp.gate_proj", "ffn_gate", config_.intermediate_size, hidden);
      whole("mlp.up_proj", "ffn_up", config_.intermediate_size, hidden);
      whole("mlp.down_proj", "ffn_down", hidden, config_.intermediate_size);
      return;
    }
    const MoeConfig& moe = *config_.moe;
    Write(gguf + "ffn_gate_inp.weight", {hidden, moe.num_experts}, kF32,
          Rows(hf + "mlp.gate.weight", 0, moe.num_experts, hidden));
    if (moe.correction_bias) {
      vector("mlp.gate.e_score_correction_bias", "exp_probs_b.bias", moe.num_experts);
    }
    Experts(hf + "mlp.experts.", gguf, moe);
    if (moe.shared_ffn == 0) return;
    const std::string shared = moe.shared_gate ? "mlp.shared_expert." : "mlp.shared_experts.";
    whole((shared + "gate_proj").c_str(), "ffn_gate_shexp", moe.shared_ffn, hidden);
    whole((shared + "up_proj").c_str(), "ffn_up_shexp", moe.shared_ffn, hidden);
    whole((shared + "down_proj").c_str(), "ffn_down_shexp", hidden, moe.shared_ffn);
    if (moe.shared_gate) vector("mlp.shared_expert_gate.weight", "ffn_gate_inp_shexp.weight", hidden);
  }

  void KvB(const std::string& name, const std::string& gguf, const MlaConfig& mla) {
    const int64_t nope = mla.qk_nope_head_dim, v = mla.v_head_dim, latent = mla.kv_lora_rank;
    if (case_.style == Style::kOld) {
      Whole(name, gguf + "attn_kv_b.weight", config_.num_heads * (nope + v), latent);
      return;
    }
    Source k, values;
    std::vector<float>& all = expected.at(name);
    for (int64_t head = 0; head < config_.num_heads; ++head) {
      for (int64_t c = 0; c < latent; ++c) {
        for (int64_t r = 0; r < nope; ++r) {
          k.push_back(&all.at(static_cast<size_t>((head * (nope + v) + r) * latent + c)));
        }
      }
      const Source rows = Rows(name, head * (nope + v) + nope, v, latent);
      values.insert(values.end(), rows.begin(), rows.end());
    }
    Write(gguf + "attn_k_b.weight", {nope, latent, config_.num_heads}, case_.type, k);
    Write(gguf + "attn_v_b.weight", {latent, v, config_.num_heads}, case_.type, values);
  }

  void Experts(const std::string& hf, const std::string& gguf, const MoeConfig& moe) {
    const int64_t hidden = config_.hidden_size;
    const auto stack = [&](const std::vector<const char*>& parts, const char* to, int64_t rows, int64_t cols) {
      Source source;
      for (int64_t expert = 0; expert < moe.num_experts; ++expert) {
        for (const char* part : parts) {
          const Source one = Rows(fmt::format("{}{}.{}.weight", hf, expert, part), 0, rows, cols);
          source.insert(source.end(), one.begin(), one.end());
        }
      }
      Write(gguf + to, {cols, rows * static_cast<int64_t>(parts.size()), moe.num_experts}, case_.type, source);
    };
    if (case_.fused) {
      stack({"gate_proj", "up_proj"}, "ffn_gate_up_exps.weight", moe.expert_ffn, hidden);
    } else {
      stack({"gate_proj"}, "ffn_gate_exps.weight", moe.expert_ffn, hidden);
      stack({"up_proj"}, "ffn_up_exps.weight", moe.expert_ffn, hidden);
    }
    stack({"down_proj"}, "ffn_down_exps.weight", hidden, moe.expert_ffn);
  }

  Case case_;
  std::mt19937 random_;
  Json hf_;
  ModelConfig config_;
};

class GgufExperts : public ::testing::TestWithParam<Case> {};

TEST_P(GgufExperts, ConfigIsThatOfTheHuggingFaceForm) {
  const Twin twin(GetParam(), 1);
  const bool old = GetParam().style == Style::kOld;
  const ModelConfig want = twin.config(), got = twin.Open()->config();
  EXPECT_EQ(got.architecture, want.architecture);
  EXPECT_EQ(got.num_layers, want.num_layers);
  EXPECT_EQ(got.intermediate_size, want.intermediate_size);
  EXPECT_EQ(got.num_kv_heads, want.num_kv_heads);
  EXPECT_EQ(got.head_dim, want.head_dim);
  EXPECT_EQ(got.rotary_dim, want.rotary_dim);
  EXPECT_EQ(got.rope_interleaved, want.rope_interleaved);
  EXPECT_EQ(got.qkv_bias, want.qkv_bias);
  EXPECT_EQ(got.qk_norm, want.qk_norm);
  EXPECT_EQ(got.tie_word_embeddings, want.tie_word_embeddings);
  EXPECT_EQ(got.eos_token_ids, want.eos_token_ids);
  EXPECT_EQ(got.moe_layers, want.moe_layers);
  EXPECT_EQ(got.attention_scale(), want.attention_scale());
  EXPECT_EQ(MakeRopeTable(got.rope, got.rotary_dim).inv_freq, MakeRopeTable(want.rope, want.rotary_dim).inv_freq);
  EXPECT_EQ(MakeRopeTable(got.rope, got.rotary_dim).attention_factor,
            MakeRopeTable(want.rope, want.rotary_dim).attention_factor);
  ASSERT_EQ(got.mla.has_value(), want.mla.has_value());
  if (want.mla) {
    EXPECT_EQ(got.mla->q_lora_rank, want.mla->q_lora_rank);
    EXPECT_EQ(got.mla->kv_lora_rank, want.mla->kv_lora_rank);
    EXPECT_EQ(got.mla->qk_nope_head_dim, want.mla->qk_nope_head_dim);
    EXPECT_EQ(got.mla->qk_rope_head_dim, want.mla->qk_rope_head_dim);
    EXPECT_EQ(got.mla->v_head_dim, want.mla->v_head_dim);
  }
  ASSERT_TRUE(got.moe && want.moe);
  EXPECT_EQ(got.moe->num_experts, want.moe->num_experts);
  EXPECT_EQ(got.moe->experts_per_token, want.moe->experts_per_token);
  EXPECT_EQ(got.moe->expert_ffn, want.moe->expert_ffn);
  EXPECT_EQ(got.moe->shared_ffn, want.moe->shared_ffn);
  EXPECT_EQ(got.moe->scoring, want.moe->scoring);
  EXPECT_EQ(got.moe->correction_bias, want.moe->correction_bias);
  EXPECT_EQ(got.moe->norm_topk, want.moe->norm_topk);
  EXPECT_EQ(got.moe->routed_scaling, want.moe->routed_scaling);
  EXPECT_EQ(got.moe->router_f32, want.moe->router_f32);
  EXPECT_EQ(got.moe->shared_gate, want.moe->shared_gate);
  EXPECT_EQ(got.moe->num_groups, old ? 1 : want.moe->num_groups);
  EXPECT_EQ(got.moe->groups_per_token, old ? 1 : want.moe->groups_per_token);
  EXPECT_EQ(got.moe->group_score,
            old && GetParam().family == Family::kV2 ? MoeConfig::GroupScore::kMax : want.moe->group_score);
}

TEST_P(GgufExperts, TensorsAreThoseOfTheHuggingFaceForm) {
  const auto seed = std::random_device()();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  const Twin twin(GetParam(), seed);
  const auto checkpoint = twin.Open();
  std::mt19937 random(seed + 1);
  const auto between = [&](int64_t a, int64_t b) { return std::uniform_int_distribution<int64_t>(a, b)(random); };
  for (const ModelTensor& tensor : ModelTensors(twin.config())) {
    SCOPED_TRACE(tensor.name);
    ASSERT_TRUE(checkpoint->Has(tensor.name));
    ASSERT_EQ(checkpoint->Shape(tensor.name),
              tensor.rows == 0 ? std::vector<int64_t>{tensor.cols} : (std::vector<int64_t>{tensor.rows, tensor.cols}));
    const bool bf16_stored = GetParam().type == kBF16 && tensor.rows > 1 && !tensor.name.ends_with(".gate.weight");
    EXPECT_EQ(checkpoint->NaturalDType(tensor.name), bf16_stored ? DType::kBF16 : DType::kF32);
    const std::vector<float>& want = twin.expected.at(tensor.name);
    const int64_t all_rows = std::max<int64_t>(tensor.rows, 1);
    for (int round = 0; round < 3; ++round) {  // the whole, then slices
      const int64_t row0 = round == 0 ? 0 : between(0, all_rows), col0 = round == 0 ? 0 : between(0, tensor.cols);
      const int64_t rows = round == 0 ? all_rows : between(0, all_rows - row0);
      const int64_t cols = round == 0 ? tensor.cols : between(0, tensor.cols - col0);
      std::vector<float> f32(static_cast<size_t>(rows * cols) + 1, -77.0f);
      std::vector<uint16_t> narrow(f32.size(), 0xdead);
      checkpoint->Read(tensor.name, row0, rows, col0, cols, DType::kF32, f32.data());
      checkpoint->Read(tensor.name, row0, rows, col0, cols, DType::kBF16, narrow.data());
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < cols; ++j) {
          const float value = want[static_cast<size_t>((row0 + i) * tensor.cols + col0 + j)];
          ASSERT_EQ(f32[static_cast<size_t>(i * cols + j)], value) << row0 + i << ", " << col0 + j;
          ASSERT_EQ(narrow[static_cast<size_t>(i * cols + j)], ToBf16(value).bits);
        }
      }
      EXPECT_EQ(f32.back(), -77.0f);
      EXPECT_EQ(narrow.back(), 0xdead);
    }
  }
  EXPECT_FALSE(checkpoint->Has("model.layers.2.mlp.experts.8.up_proj.weight"));
  EXPECT_FALSE(checkpoint->Has("model.layers.3.self_attn.kv_b_proj.weight"));
}

INSTANTIATE_TEST_SUITE_P(
    Files, GgufExperts,
    ::testing::Values(Case{Family::kV2Lite, Style::kOld, kQ8}, Case{Family::kV2Lite, Style::kNew, kF32},
                      Case{Family::kV2Lite, Style::kNew, kQ8, true}, Case{Family::kV2, Style::kOld, kBF16},
                      Case{Family::kV2, Style::kNew, kQ8}, Case{Family::kV3, Style::kOld, kF32},
                      Case{Family::kV3, Style::kNew, kBF16}, Case{Family::kV3, Style::kNew, kQ8, true},
                      Case{Family::kQwen2, Style::kNew, kQ8}, Case{Family::kQwen3, Style::kNew, kF32},
                      Case{Family::kQwen3, Style::kNew, kBF16, true}, Case{Family::kQwen3, Style::kNew, kQ8}));

TEST(GgufExpertFiles, OverridesGiveOldFilesTheirGroups) {
  const Twin twin({Family::kV3, Style::kOld, kF32}, 1);
  const auto checkpoint = twin.Open({{"n_group", 4}, {"topk_group", 3}});
  EXPECT_EQ(checkpoint->config().moe->num_groups, 4);
  EXPECT_EQ(checkpoint->config().moe->groups_per_token, 3);
}

TEST(GgufExpertFiles, LayersThatGuessTokensAreLeftOut) {
  Twin twin({Family::kV3, Style::kNew, kF32}, 1);
  twin.writer.U32("deepseek2.nextn_predict_layers", 1);
  EXPECT_EQ(twin.Open()->config().num_layers, 2);
}

TEST(GgufExpertFiles, RefusesWhatItCannotRun) {
  const auto error = [](Family family, const auto& change, const char* tensor = nullptr) {
    Twin twin({family, Style::kNew, kF32}, 1);
    change(twin.writer);
    return ErrorOf([&] {
      const auto checkpoint = twin.Open();
      if (tensor != nullptr) checkpoint->Shape(tensor);
    });
  };
  EXPECT_TRUE(Mentions(error(Family::kV3, [](GgufWriter& w) { w.F32("deepseek2.attention.temperature_scale", 0.1f); }),
                       "deepseek2.attention.temperature_scale"));
  EXPECT_TRUE(Mentions(error(Family::kV3, [](GgufWriter& w) { w.F32("deepseek2.rope.scaling.attn_factor", 0.5f); }),
                       "attn_factor\" = 0.5"));
  EXPECT_TRUE(Mentions(error(Family::kQwen3, [](GgufWriter& w) { w.U32("qwen3moe.expert_gating_func", 2); }),
                       "expert_gating_func\" = 2: not supported"));
  const auto nothing = [](GgufWriter&) {};
  EXPECT_TRUE(Mentions(error(Family::kV3, nothing, "model.layers.1.mlp.experts.8.up_proj.weight"),
                       "blk.1.ffn_up_exps.weight) is missing"));
  EXPECT_TRUE(Mentions(error(Family::kV3, nothing, "model.layers.7.self_attn.kv_b_proj.weight"),
                       "blk.7.attn_kv_b.weight) is missing"));
  const auto odd = [](GgufWriter& w) {
    w.F32Tensor("blk.9.attn_k_b.weight", {32, 191, 2}, std::vector<float>(32 * 191 * 2));
    w.F32Tensor("blk.9.attn_v_b.weight", {192, 128, 2}, std::vector<float>(192 * 128 * 2));
    w.F32Tensor("blk.9.ffn_up_exps.weight", {64, 96}, std::vector<float>(64 * 96));
  };
  EXPECT_TRUE(Mentions(error(Family::kV3, odd, "model.layers.9.self_attn.kv_b_proj.weight"),
                       "blk.9.attn_k_b.weight has dimensions [32, 191, 2]"));
  EXPECT_TRUE(Mentions(error(Family::kV3, odd, "model.layers.9.mlp.experts.0.up_proj.weight"),
                       "blk.9.ffn_up_exps.weight has dimensions [64, 96]"));
}

}  // namespace
}  // namespace weft
