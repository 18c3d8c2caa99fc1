#include "weft/model/random_checkpoint.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "weft/model/checkpoint.h"
#include "weft/model/test_files.h"

namespace weft {
namespace {

using testing::ErrorOf;
using testing::Mentions;
using Json = nlohmann::json;

// Biases, norms, an LM head, and sizes that no chunk or group of four divides.
Json Config() {
  return {{"architectures", {"Qwen3ForCausalLM"}},
          {"model_type", "qwen3"},
          {"attention_bias", true},
          {"hidden_size", 50},
          {"intermediate_size", 70},
          {"num_hidden_layers", 2},
          {"num_attention_heads", 4},
          {"num_key_value_heads", 2},
          {"head_dim", 6},
          {"vocab_size", 21001},  // the embedding is a little more than one chunk of 2^20 values
          {"max_position_embeddings", 100},
          {"eos_token_id", 2},
          {"dtype", "float32"}};
}

std::vector<float> Whole(const Checkpoint& checkpoint, const ModelTensor& tensor) {
  std::vector<float> values(static_cast<size_t>(tensor.elements()));
  checkpoint.Read(tensor.name, 0, std::max<int64_t>(tensor.rows, 1), 0, tensor.cols, DType::kF32, values.data());
  return values;
}

TEST(RandomCheckpoint, ReadsBackWithTheRightShapesAndMoments) {
  const uint64_t seed = std::random_device()();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  const testing::TempFolder folder;
  int64_t told = 0;
  const int64_t bytes =
      WriteRandomCheckpoint(Config(), folder.path("m"), {.seed = seed, .on_bytes = [&](int64_t n) { told += n; }});
  const auto checkpoint = OpenCheckpoint(folder.path("m"));
  EXPECT_EQ(checkpoint->config().dtype, DType::kBF16);
  EXPECT_EQ(checkpoint->total_bytes(), bytes);
  EXPECT_EQ(told, bytes);
  EXPECT_FALSE(std::filesystem::exists(folder.path("m/model.safetensors.index.json")));
  for (const ModelTensor& tensor : ModelTensors(checkpoint->config())) {
    SCOPED_TRACE(tensor.name);
    EXPECT_EQ(checkpoint->Shape(tensor.name),
              tensor.rows == 0 ? std::vector<int64_t>{tensor.cols} : (std::vector<int64_t>{tensor.rows, tensor.cols}));
    EXPECT_EQ(checkpoint->NaturalDType(tensor.name), DType::kBF16);
    const std::vector<float> values = Whole(*checkpoint, tensor);
    double sum = 0, squares = 0, pairs = 0, fourth = 0;
    const double mean = tensor.kind == ModelTensor::Kind::kNorm ? 1.0 : 0.0;
    const double deviation = tensor.rows == 0 ? 0.1 : 1.0 / std::sqrt(static_cast<double>(tensor.cols));
    for (size_t i = 0; i < values.size(); ++i) {
      ASSERT_TRUE(std::isfinite(values[i]));
      const double z = (values[i] - mean) / deviation;
      sum += z;
      squares += z * z;
      fourth += z * z * z * z;
      if (i > 0) pairs += z * (values[i - 1] - mean) / deviation;
    }
    // Six standard errors of each moment of n independent normal values: 1, 2, 96 and 1 are their variances.
    const auto n = static_cast<double>(values.size());
    EXPECT_LE(std::abs(sum / n), 6 / std::sqrt(n));
    EXPECT_LE(std::abs(squares / n - 1), 6 * std::sqrt(2 / n) + 0.01);
    EXPECT_LE(std::abs(pairs / n), 6 / std::sqrt(n));
    EXPECT_TRUE(n < 10000 || std::abs(fourth / n - 3) <= 6 * std::sqrt(96 / n) + 0.03) << fourth / n;
  }
}

TEST(RandomCheckpoint, ValuesDependOnSeedAndNameOnly) {
  const testing::TempFolder folder;
  WriteRandomCheckpoint(Config(), folder.path("a"), {.seed = 1});
  WriteRandomCheckpoint(Config(), folder.path("shards"), {.seed = 1, .max_shard_bytes = 30000});
  WriteRandomCheckpoint(Config(), folder.path("f32"), {.seed = 1, .dtype = DType::kF32});
  WriteRandomCheckpoint(Config(), folder.path("other"), {.seed = 2});
  const auto a = OpenCheckpoint(folder.path("a")), shards = OpenCheckpoint(folder.path("shards"));
  const auto f32 = OpenCheckpoint(folder.path("f32")), other = OpenCheckpoint(folder.path("other"));
  EXPECT_TRUE(std::filesystem::exists(folder.path("shards/model.safetensors.index.json")));
  EXPECT_TRUE(std::filesystem::exists(folder.path("shards/model-00001-of-00004.safetensors")));
  EXPECT_EQ(f32->config().dtype, DType::kF32);
  EXPECT_EQ(f32->total_bytes(), 2 * a->total_bytes());
  std::vector<float> first;
  for (const ModelTensor& tensor : ModelTensors(a->config())) {
    SCOPED_TRACE(tensor.name);
    const std::vector<float> values = Whole(*a, tensor);
    EXPECT_EQ(Whole(*shards, tensor), values);
    EXPECT_NE(Whole(*other, tensor), values);
    const std::vector<float> exact = Whole(*f32, tensor);
    bool rounded = true;
    for (size_t i = 0; i < values.size(); ++i) rounded = rounded && ToFloat(ToBf16(exact[i])) == values[i];
    EXPECT_TRUE(rounded);
    if (first.empty()) first = values;
    EXPECT_TRUE(tensor.name != "lm_head.weight" || values != first);  // of the same shape
  }
}

TEST(RandomCheckpoint, RefusesToOverwriteAndWrongOptions) {
  const testing::TempFolder folder;
  WriteRandomCheckpoint(Config(), folder.path("a"), {});
  EXPECT_TRUE(Mentions(ErrorOf([&] { WriteRandomCheckpoint(Config(), folder.path("a"), {}); }), "already"));
  Json wrong = Config();
  wrong["hidden_act"] = "gelu";
  EXPECT_TRUE(Mentions(ErrorOf([&] { WriteRandomCheckpoint(wrong, folder.path("b"), {}); }), "hidden_act"));
  EXPECT_TRUE(Mentions(ErrorOf([&] { WriteRandomCheckpoint(Config(), folder.path("b"), {.dtype = DType::kF16}); }),
                       "bfloat16"));
  folder.Write("file", "");
  EXPECT_TRUE(Mentions(ErrorOf([&] { WriteRandomCheckpoint(Config(), folder.path("file/x"), {}); }), "cannot be made"));
}

Json Published(const std::string& name) {
  return Json::parse(testing::ReadAll(WEFT_TEST_DATA "/../../bench/configs/" + name + ".json"));
}

int64_t Parameters(const ModelConfig& config) {
  int64_t parameters = 0;
  for (const ModelTensor& tensor : ModelTensors(config)) parameters += tensor.elements();
  return parameters;
}

TEST(RandomCheckpoint, PublishedConfigsOfTheBenchmarks) {
  // What the Hub says of their files; of R1, which has scales and a token-guessing layer besides, what the 671B of
  // its paper are to the last one.
  EXPECT_EQ(Parameters(ParseModelConfig(Published("qwen3-0.6b"))), 596049920);
  EXPECT_EQ(Parameters(ParseModelConfig(Published("deepseek-v2-lite"))), 15706484224);
  EXPECT_EQ(Parameters(ParseModelConfig(Published("qwen3-235b-a22b"))), 235093634560);
  EXPECT_EQ(Parameters(ParseModelConfig(Published("deepseek-r1"))), 671026419200);
}

TEST(CutConfig, KeepsALayerOfExpertsAndEqualGroups) {
  const Json r1 = Published("deepseek-r1");
  for (const int64_t layers : {1, 2, 3, 4, 7}) {
    const ModelConfig c = ParseModelConfig(CutConfig(r1, {.layers = layers}));
    EXPECT_EQ(c.num_layers, layers);
    std::vector<bool> want(static_cast<size_t>(layers), true);
    for (int64_t i = 0; i < std::min<int64_t>(3, layers - 1); ++i) want[static_cast<size_t>(i)] = false;
    EXPECT_EQ(c.moe_layers, want);
    EXPECT_EQ(c.moe->num_experts, 256);
  }
  // Every number of experts makes a config that parses, which checks groups and experts per token.
  for (int64_t experts = 1; experts <= 256; ++experts) {
    const ModelConfig c = ParseModelConfig(CutConfig(r1, {.layers = 1, .experts = experts}));
    EXPECT_EQ(c.moe->num_experts, experts);
    EXPECT_EQ(c.moe->experts_per_token, std::min<int64_t>(8, experts));
  }
  const ModelConfig c = ParseModelConfig(CutConfig(r1, {.experts = 32}));
  EXPECT_EQ(c.num_layers, 61);
  EXPECT_EQ(c.moe->num_groups, 8);
  EXPECT_EQ(c.moe->groups_per_token, 4);
  const ModelConfig qwen = ParseModelConfig(CutConfig(Published("qwen3-235b-a22b"), {.layers = 2, .experts = 4}));
  EXPECT_EQ(qwen.num_layers, 2);
  EXPECT_EQ(qwen.moe->num_experts, 4);
  EXPECT_EQ(qwen.moe->experts_per_token, 4);
  EXPECT_EQ(CutConfig(r1, {}), r1);
  EXPECT_TRUE(Mentions(ErrorOf([&] { CutConfig(r1, {.layers = 62}); }), "the config has 61"));
  EXPECT_TRUE(Mentions(ErrorOf([&] { CutConfig(r1, {.experts = 257}); }), "the config has 256"));
  EXPECT_TRUE(Mentions(ErrorOf([&] { CutConfig(Published("qwen3-0.6b"), {.experts = 2}); }), "the config has 0"));
}

// With an FP8 config, whose random form is bf16, experts, latents and a token-guessing layer.
TEST(RandomCheckpoint, HasTheTensorsOfACutConfig) {
  Json config = CutConfig(Published("deepseek-r1"), {.layers = 2, .experts = 6});
  config.update({{"hidden_size", 32},
                 {"intermediate_size", 48},
                 {"moe_intermediate_size", 16},
                 {"vocab_size", 40},
                 {"num_attention_heads", 2},
                 {"q_lora_rank", 24},
                 {"kv_lora_rank", 20},
                 {"qk_nope_head_dim", 8},
                 {"qk_rope_head_dim", 6},
                 {"v_head_dim", 10}});
  const testing::TempFolder folder;
  const int64_t bytes = WriteRandomCheckpoint(config, folder.path("m"), {});
  const auto checkpoint = OpenCheckpoint(folder.path("m"));
  EXPECT_EQ(checkpoint->total_bytes(), bytes);
  EXPECT_FALSE(checkpoint->config().fp8_blocks);
  EXPECT_EQ(checkpoint->config().moe_layers, (std::vector<bool>{false, true}));
  for (const ModelTensor& tensor : ModelTensors(ParseModelConfig(config))) {
    for (const float value : Whole(*checkpoint, tensor)) ASSERT_TRUE(std::isfinite(value)) << tensor.name;
  }
}

}  // namespace
}  // namespace weft
