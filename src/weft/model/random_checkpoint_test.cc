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

TEST(RandomCheckpoint, PublishedConfigsOfTheBenchmarks) {
  const Json json = Json::parse(testing::ReadAll(WEFT_TEST_DATA "/../../bench/configs/qwen3-0.6b.json"));
  const ModelConfig config = ParseModelConfig(json);
  int64_t parameters = 0;
  for (const ModelTensor& tensor : ModelTensors(config)) parameters += tensor.elements();
  EXPECT_EQ(parameters, 596049920);  // what the Hub says of Qwen/Qwen3-0.6B's tied weights
}

}  // namespace
}  // namespace weft
