#include "weft/model/router.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <limits>
#include <random>
#include <set>
#include <vector>

namespace weft {
namespace {

std::set<int32_t> Choose(const MoeConfig& config, const std::vector<float>& logits, const std::vector<float>& bias) {
  std::vector<int32_t> experts(static_cast<size_t>(config.experts_per_token));
  std::vector<float> weights(experts.size());
  std::vector<float> scratch(2 * logits.size());
  ChooseExperts(config, logits.data(), bias.data(), experts.data(), weights.data(), scratch.data());
  return {experts.begin(), experts.end()};
}

// What a change of one expert's score by a bit less than the margin never does, and by a bit more does for some expert.
TEST(Router, TheMarginIsWhatAScoreMayChange) {
  const uint64_t seed = std::random_device()();
  SCOPED_TRACE(seed);
  std::mt19937_64 rng(seed);
  std::normal_distribution<float> normal;
  for (int round = 0; round < 300; ++round) {
    MoeConfig config;
    config.num_groups = std::array{1, 2, 4}[rng() % 3];
    config.num_experts = config.num_groups * static_cast<int64_t>(3 + rng() % 6);
    config.groups_per_token = 1 + static_cast<int64_t>(rng() % static_cast<uint64_t>(config.num_groups));
    const auto reachable = config.num_experts / config.num_groups * config.groups_per_token;
    config.experts_per_token = 1 + static_cast<int64_t>(rng() % static_cast<uint64_t>(reachable));
    config.scoring = rng() % 2 == 0 ? MoeConfig::Scoring::kSoftmax : MoeConfig::Scoring::kSigmoid;
    config.group_score = rng() % 2 == 0 ? MoeConfig::GroupScore::kMax : MoeConfig::GroupScore::kTop2Sum;
    std::vector<float> logits(static_cast<size_t>(config.num_experts)), bias(logits.size());
    for (float& x : logits) x = normal(rng);
    for (float& x : bias) x = 0.1f * normal(rng);
    std::vector<float> scratch(2 * logits.size());
    const float margin = ChoiceMargin(config, logits.data(), bias.data(), scratch.data());
    if (config.experts_per_token == config.num_experts) {
      EXPECT_EQ(margin, std::numeric_limits<float>::infinity());
      continue;
    }
    ASSERT_GE(margin, 0.0f);
    if (margin < 1e-4f || margin == std::numeric_limits<float>::infinity()) continue;
    const std::set<int32_t> chosen = Choose(config, logits, bias);
    ASSERT_EQ(chosen.size(), static_cast<size_t>(config.experts_per_token));
    const auto changes = [&](float by) {
      bool any = false;
      for (size_t e = 0; e < bias.size(); ++e) {
        std::vector<float> other = bias;
        other[e] += chosen.contains(static_cast<int32_t>(e)) ? -by : by;
        any |= Choose(config, logits, other) != chosen;
      }
      return any;
    };
    EXPECT_FALSE(changes(margin - 3e-5f)) << "round " << round;
    // Of several groups one may come in whose experts are not among the best, and nothing changes.
    if (config.groups_per_token == 1) {
      EXPECT_TRUE(changes(margin + 3e-5f)) << "round " << round;
    }
  }
}

// A tie is seen where ChooseExperts has to break one.
TEST(Router, ATieHasNoMargin) {
  MoeConfig config;
  config.num_experts = 4;
  config.experts_per_token = 2;
  const std::vector<float> logits = {1, 3, 1, 0};
  std::vector<float> scratch(8);
  EXPECT_EQ(ChoiceMargin(config, logits.data(), nullptr, scratch.data()), 0.0f);
  EXPECT_EQ(Choose(config, logits, std::vector<float>(4)), (std::set<int32_t>{0, 1}));
}

}  // namespace
}  // namespace weft
