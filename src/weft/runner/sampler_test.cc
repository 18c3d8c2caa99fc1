#include "weft/runner/sampler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>
#include <set>

#include "weft/runner/test_support.h"

namespace weft {
namespace {

constexpr float kNegInf = -std::numeric_limits<float>::infinity();

SamplingParams ParamsOf(const nlohmann::json& p) {
  SamplingParams params;
  params.temperature = p.at("temperature");
  params.top_k = p.at("top_k");
  params.top_p = p.at("top_p");
  params.min_p = p.at("min_p");
  params.repetition_penalty = p.at("repetition_penalty");
  params.presence_penalty = p.at("presence_penalty");
  params.frequency_penalty = p.at("frequency_penalty");
  for (const auto& [token, bias] : p.at("logit_bias").items()) params.logit_bias[std::stoi(token)] = bias;
  params.bad_words = p.at("bad_words").get<std::vector<std::vector<int32_t>>>();
  params.min_tokens = p.at("min_tokens");
  params.stop_token_ids = p.at("stop_token_ids").get<std::vector<int32_t>>();
  return params;
}

class EveryTable : public ::testing::TestWithParam<const char*> {
 protected:
  const KernelTable& kernels_ = KernelsByName(GetParam());
};

TEST_P(EveryTable, ReferenceCases) {
  std::ifstream file(std::string(WEFT_TEST_DATA) + "/sampling/sampling.json");
  const nlohmann::json golden = nlohmann::json::parse(file);
  const double tolerance = golden.at("tolerance_abs");
  ASSERT_EQ(golden.at("cases").size(), 21u);
  for (const auto& c : golden.at("cases")) {
    SCOPED_TRACE(c.at("name").get<std::string>());
    const SamplingParams params = ParamsOf(c.at("params"));
    const std::vector<int32_t> prompt = c.at("prompt_token_ids");
    const std::vector<int32_t> output = c.at("output_token_ids");
    std::vector<float> logits = c.at("logits");
    ApplyLogitsProcessors(params, prompt, output, logits);
    const auto& penalised = c.at("penalised_logits");
    for (size_t i = 0; i < logits.size(); ++i) {
      if (penalised[i].is_null()) {
        EXPECT_EQ(logits[i], kNegInf);
      } else {
        EXPECT_NEAR(logits[i], penalised[i].get<float>(), tolerance);
      }
    }
    LogitsToProbabilities(params, logits, kernels_);
    const std::vector<float> probs = c.at("probs");
    int survivors = 0;
    for (size_t i = 0; i < logits.size(); ++i) {
      EXPECT_NEAR(logits[i], probs[i], tolerance) << i;
      survivors += logits[i] > 0;
    }
    EXPECT_EQ(survivors, c.at("survivors").get<int>());
  }
}

// top-p by its definition: sort ascending, drop while the running sum is at most 1 - p.
TEST_P(EveryTable, TopPOverLargeVocabulariesAgainstItsDefinition) {
  std::mt19937_64 rng(testing::FreshSeed());
  for (int round = 0; round < 20; ++round) {
    const size_t n = std::uniform_int_distribution<size_t>(1, 5000)(rng);
    std::normal_distribution<float> normal(0, std::uniform_real_distribution<float>(0.01f, 6)(rng));
    std::vector<float> logits(n);
    for (float& x : logits) x = normal(rng);
    SamplingParams params;
    params.top_p = std::uniform_real_distribution<float>(0.01f, 0.999f)(rng);

    double sum = 0;
    for (const float x : logits) sum += std::exp(static_cast<double>(x));
    std::vector<size_t> order(n);
    for (size_t i = 0; i < n; ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return logits[a] < logits[b]; });
    std::vector<double> kept(n);
    double running = 0;
    double total = 0;
    double edge = 1;  // how close the decision at the edge was: f32 sums may take it the other way
    for (size_t i = 0; i < n; ++i) {
      const double p = std::exp(static_cast<double>(logits[order[i]])) / sum;
      running += p;
      edge = std::min(edge, std::abs(running - (1 - static_cast<double>(params.top_p))));
      if (running > 1 - static_cast<double>(params.top_p) || i + 1 == n) total += kept[order[i]] = p;
    }
    LogitsToProbabilities(params, logits, kernels_);
    if (edge < 1e-5) continue;
    for (size_t i = 0; i < n; ++i) {
      EXPECT_EQ(logits[i] > 0, kept[i] > 0) << i;
      EXPECT_NEAR(logits[i], kept[i] / total, 1e-5);
    }
  }
}

TEST_P(EveryTable, DrawsFollowTheProbabilities) {
  const uint64_t seed = testing::FreshSeed();
  const std::vector<float> logits = {0.5f, -1.0f, 2.0f, kNegInf, 0.0f};
  std::vector<float> probabilities = logits;
  kernels_.softmax(probabilities.data(), 5);
  std::vector<int> counts(5);
  constexpr int kDraws = 40000;
  std::vector<int32_t> output;
  for (int i = 0; i < kDraws; ++i) {
    std::vector<float> copy = logits;
    const std::vector<int32_t> prompt = {1};
    ++counts[static_cast<size_t>(SampleToken({}, seed + static_cast<uint64_t>(i), prompt, output, copy, kernels_))];
  }
  for (size_t i = 0; i < 5; ++i) {
    const double p = static_cast<double>(probabilities[i]);
    const double sigma = std::sqrt(kDraws * p * (1 - p));
    EXPECT_NEAR(counts[i], kDraws * p, 5 * sigma + 0.5) << i;
  }
}

TEST_P(EveryTable, TheSameSeedAndPositionDrawsTheSame) {
  std::mt19937_64 rng(testing::FreshSeed());
  std::normal_distribution<float> normal;
  std::vector<float> logits(300);
  for (float& x : logits) x = normal(rng);
  std::vector<int32_t> output, first;
  int differs = 0;
  for (int i = 0; i < 50; ++i) {
    std::vector<float> a = logits, b = logits, c = logits;
    const int32_t x = SampleToken({}, 5, {}, output, a, kernels_);
    EXPECT_EQ(x, SampleToken({}, 5, {}, output, b, kernels_));
    differs += x != SampleToken({}, 6, {}, output, c, kernels_);
    output.push_back(x);
  }
  EXPECT_GT(differs, 25);
  EXPECT_GT(std::set<int32_t>(output.begin(), output.end()).size(), 20u);
}

TEST_P(EveryTable, LogprobsAndRanks) {
  std::mt19937_64 rng(testing::FreshSeed());
  std::normal_distribution<float> normal(0, 3);
  std::vector<float> logits(1000);
  for (float& x : logits) x = normal(rng);
  double sum = 0;
  for (const float x : logits) sum += std::exp(static_cast<double>(x));
  const PositionLogprobs result = LogprobsOf(logits, 17, 5, kernels_);
  int rank = 0;
  for (const float x : logits) rank += x >= logits[17];
  EXPECT_EQ(result.chosen.rank, rank);
  EXPECT_NEAR(result.chosen.logprob, logits[17] - std::log(sum), 1e-5);
  ASSERT_EQ(result.top.size(), 5u);
  EXPECT_EQ(result.top[0].token, kernels_.argmax(logits.data(), 1000));
  for (size_t i = 0; i < 5; ++i) EXPECT_EQ(result.top[i].rank, static_cast<int32_t>(i + 1));
  EXPECT_EQ(LogprobsOf(logits, 17, -1, kernels_).top.size(), 1000u);
  EXPECT_TRUE(LogprobsOf(logits, 17, 0, kernels_).top.empty());
}

TEST_P(EveryTable, NothingToChooseFromAndNaN) {
  std::vector<float> logits = {1, 2, 3};
  SamplingParams params;
  params.bad_words = {{0}, {1}, {2}};
  EXPECT_EQ(SampleToken(params, 1, {}, {}, logits, kernels_), -1);
  std::vector<float> nan = {1, std::numeric_limits<float>::quiet_NaN(), 3};
  EXPECT_EQ(SampleToken({}, 1, {}, {}, nan, kernels_), -1);
  SamplingParams only;
  only.allowed_token_ids = {1};
  std::vector<float> three = {1, 2, 3};
  EXPECT_EQ(SampleToken(only, 1, {}, {}, three, kernels_), 1);
}

INSTANTIATE_TEST_SUITE_P(Kernels, EveryTable, ::testing::Values("ref", "cpu"));

}  // namespace
}  // namespace weft
