// The reference checkpoints against the logits and greedy continuations of the original implementation
// (tests/data/models, made with transformers in f32 and bf16; tolerances in each manifest.json).

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>

#include "weft/core/error.h"
#include "weft/model/safetensors.h"
#include "weft/runner/test_support.h"

namespace weft {
namespace {

struct GoldenRun {
  std::string model;
  DType dtype;
  std::string kernels;
  cp::ParallelConfig parallel{};
};

std::string DataPath(const std::string& path) { return std::string(WEFT_TEST_DATA) + "/" + path; }

nlohmann::json ReadJson(const std::string& path) {
  std::ifstream file(path);
  return nlohmann::json::parse(file);
}

std::unique_ptr<StepExecutor> Open(const std::string& path, const GoldenRun& run, int64_t tokens) {
  ExecutorOptions options;
  options.parallel = run.parallel;
  options.dtype = run.dtype;
  options.kv_dtype = run.dtype;
  options.kernels = run.kernels;
  options.threads_per_rank = 2;
  options.num_blocks = tokens / run.parallel.block_tokens + 2;
  options.max_model_len = tokens;
  options.progress = false;
  return MakeThreadExecutor(options, OpenCheckpoint(path));
}

std::vector<int32_t> ToInt32(const std::vector<int64_t>& values) { return {values.begin(), values.end()}; }

std::vector<float> Bf16ToFloat(const std::vector<uint16_t>& values) {
  std::vector<float> result;
  for (const uint16_t bits : values) result.push_back(ToFloat(bf16{bits}));
  return result;
}

class Golden : public ::testing::TestWithParam<GoldenRun> {};

TEST_P(Golden, LogitsAndGreedyTokens) {
  const GoldenRun& run = GetParam();
  const std::string folder = DataPath("models/" + run.model);
  const nlohmann::json manifest = ReadJson(folder + "/manifest.json");
  const SafetensorsFile expected(folder + "/expected.safetensors");
  const auto tolerance = manifest.at("tolerance");
  const bool f32 = run.dtype == DType::kF32;
  const auto executor = Open(folder, run, 2200);
  std::mt19937_64 rng(1);

  std::vector<double> errors;
  size_t greedy_compared = 0;
  // Where a router is close to a tie, a rounding of bf16 flips an expert, and that token's logits are all others'.
  const nlohmann::json config = ReadJson(folder + "/config.json");
  const bool experts = config.contains("num_experts") || config.contains("n_routed_experts");
  size_t flipped = 0;
  const size_t prompts = manifest.at("prompts").size();
  for (size_t k = 0; k < prompts; ++k) {
    const std::string prefix = fmt::format("prompt_{}.", k);
    testing::DrivenRequest request;
    request.prompt = ToInt32(expected.Values<int64_t>(prefix + "tokens"));
    // The scalar kernels take seconds for a prompt of thousands.
    if (run.kernels == "ref" && request.prompt.size() > 200) continue;
    request.forced_output = ToInt32(expected.Values<int64_t>(prefix + "greedy"));
    const auto margin = expected.Values<float>(prefix + "greedy_margin");
    const auto positions = expected.Values<int64_t>(prefix + "positions");
    const auto logits = f32 ? expected.Values<float>(prefix + "logits")
                            : Bf16ToFloat(expected.Values<uint16_t>(prefix + "logits_bf16"));
    const size_t vocab = logits.size() / positions.size();

    const auto result = testing::Drive(*executor, run.parallel, {request}, {}, rng)[0];
    for (size_t i = 0; i < positions.size(); ++i) {
      const auto begin = logits.begin() + static_cast<std::ptrdiff_t>(i * vocab);
      errors.push_back(testing::RelativeError(result.logits.at(positions[i]),
                                              std::vector<float>(begin, begin + static_cast<std::ptrdiff_t>(vocab))));
    }
    // A step whose two best tokens lie closer than the arithmetic can tell apart proves nothing.
    const float clear = f32 ? 2e-3f : 0.4f;
    for (size_t i = 0; i < request.forced_output.size(); ++i) {
      if (margin[i] < clear) continue;
      ++greedy_compared;
      if (!f32 && experts) {
        flipped += result.sampled[i] != request.forced_output[i];
        continue;
      }
      EXPECT_EQ(result.sampled[i], request.forced_output[i]) << "prompt " << k << ", output " << i;
    }
  }
  ASSERT_GT(errors.size(), 20u);
  std::sort(errors.begin(), errors.end());
  const double median = errors[errors.size() / 2];
  if (f32) {
    EXPECT_LE(errors.back(), tolerance.at("f32").get<double>());
    EXPECT_GT(greedy_compared, 60u);
  } else {
    EXPECT_LE(median, tolerance.at("bf16_median").get<double>());
    if (!experts) {
      EXPECT_LE(errors.back(), tolerance.at("bf16_max").get<double>());
    }
    EXPECT_LE(flipped * 20, greedy_compared);
    EXPECT_GT(greedy_compared, 20u);
  }
  RecordProperty("worst_error", fmt::format("{}", errors.back()));
}

std::vector<GoldenRun> Runs() {
  std::vector<GoldenRun> runs;
  for (const char* model : {"llama_llama3", "llama_tied", "llama_bias", "qwen2_yarn", "qwen3"}) {
    runs.push_back({model, DType::kF32, "cpu"});
    runs.push_back({model, DType::kBF16, "cpu"});
    runs.push_back({model, DType::kF32, "ref"});
    runs.push_back({model, DType::kF32, "cpu", {.prefill_context_parallel = 2, .tensor_parallel = 2}});
  }
  // Two KV heads on four ranks: copies, of which DCP makes shards.
  runs.push_back(
      {"qwen3",
       DType::kF32,
       "cpu",
       {.prefill_context_parallel = 2, .decode_context_parallel = 2, .tensor_parallel = 4, .kv_interleave = 16}});
  // One KV head of four query heads.
  std::erase_if(runs,
                [](const GoldenRun& run) { return run.model == "llama_tied" && run.parallel.tensor_parallel == 2; });
  runs.push_back({"llama_tied",
                  DType::kBF16,
                  "cpu",
                  {.prefill_context_parallel = 2, .decode_context_parallel = 2, .tensor_parallel = 2}});
  for (const char* model : {"deepseek_v2_lite", "deepseek_v2_full", "deepseek_v3", "qwen3_moe"}) {
    const bool mla = std::string_view(model) != "qwen3_moe";
    runs.push_back({model, DType::kF32, "cpu"});
    runs.push_back({model, DType::kBF16, "cpu"});
    runs.push_back({model, DType::kF32, "ref"});
    runs.push_back({model, DType::kF32, "cpu", {.prefill_context_parallel = 2, .tensor_parallel = 2}});
    runs.push_back({model,
                    DType::kF32,
                    "cpu",
                    {.prefill_context_parallel = 2,
                     .decode_context_parallel = mla ? 4 : 2,
                     .tensor_parallel = 4,
                     .kv_interleave = 16,
                     .expert_parallel = true}});
  }
  return runs;
}

INSTANTIATE_TEST_SUITE_P(Models, Golden, ::testing::ValuesIn(Runs()), [](const auto& param) {
  const GoldenRun& run = param.param;
  return fmt::format("{}_{}_{}_tp{}pcp{}dcp{}{}", run.model, NameOf(run.dtype), run.kernels,
                     run.parallel.tensor_parallel, run.parallel.prefill_context_parallel,
                     run.parallel.decode_context_parallel, run.parallel.expert_parallel ? "ep" : "");
});

TEST(GoldenGguf, LogitsOfEveryFileType) {
  const nlohmann::json manifest = ReadJson(DataPath("gguf/manifest.json"));
  const SafetensorsFile expected(DataPath("gguf/expected.safetensors"));
  const double tolerance = manifest.at("tolerance").at("logits_f32").get<double>();
  std::mt19937_64 rng(1);
  for (const std::string type : {"F32", "BF16", "Q8_0", "Q4_0"}) {
    SCOPED_TRACE(type);
    const GoldenRun run{"", DType::kF32, "cpu"};
    const auto executor = Open(DataPath("gguf/llama-" + type + ".gguf"), run, 512);
    const testing::DrivenRequest request{ToInt32(expected.Values<int64_t>("tokens")), {0}};
    const auto result = testing::Drive(*executor, run.parallel, {request}, {}, rng)[0];
    const auto logits = expected.Values<float>(type + ".logits");
    const size_t vocab = logits.size() / request.prompt.size();
    for (size_t i = 0; i < request.prompt.size(); ++i) {
      const auto begin = logits.begin() + static_cast<std::ptrdiff_t>(i * vocab);
      EXPECT_LE(testing::RelativeError(result.logits.at(static_cast<int64_t>(i)),
                                       std::vector<float>(begin, begin + static_cast<std::ptrdiff_t>(vocab))),
                tolerance)
          << i;
    }
  }
}

}  // namespace
}  // namespace weft
