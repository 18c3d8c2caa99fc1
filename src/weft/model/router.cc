#include "weft/model/router.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

namespace weft {
namespace {

constexpr float kExcluded = -std::numeric_limits<float>::infinity();

// A group's own score: its best expert's, or the sum of its two best.
float GroupScoreOf(const MoeConfig& config, const float* scores, int64_t n) {
  float best = kExcluded;
  float second = kExcluded;
  for (int64_t i = 0; i < n; ++i) {
    if (scores[i] > best) {
      second = best;
      best = scores[i];
    } else {
      second = std::max(second, scores[i]);
    }
  }
  if (config.group_score == MoeConfig::GroupScore::kMax || n == 1) return best;
  return best + second;
}

// Experts outside the best groups are excluded. Gives the distance between the last group that is in and the best one
// that is not.
float LimitGroups(const MoeConfig& config, float* choice) {
  const int64_t size = config.num_experts / config.num_groups;
  constexpr int64_t kMostGroups = 256;
  float group[kMostGroups];
  const int64_t groups = std::min(config.num_groups, kMostGroups);
  for (int64_t g = 0; g < groups; ++g) group[g] = GroupScoreOf(config, choice + g * size, size);
  float worst_in = std::numeric_limits<float>::infinity();
  float best_out = kExcluded;
  for (int64_t g = 0; g < groups; ++g) {
    // The rank of group g: how many are better, or as good and earlier.
    int64_t better = 0;
    for (int64_t other = 0; other < groups; ++other) {
      better += group[other] > group[g] || (group[other] == group[g] && other < g);
    }
    if (better >= config.groups_per_token) {
      std::fill_n(choice + g * size, size, kExcluded);
      best_out = std::max(best_out, group[g]);
    } else {
      worst_in = std::min(worst_in, group[g]);
    }
  }
  return worst_in - best_out;
}

// Writes each expert's score, and what it is chosen by: kExcluded outside the best groups. Gives LimitGroups' distance.
float ScoreExperts(const MoeConfig& config, const float* logits, const float* bias, float* scores, float* choice) {
  const int64_t n = config.num_experts;
  if (config.scoring == MoeConfig::Scoring::kSoftmax) {
    const float largest = *std::max_element(logits, logits + n);
    float sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += scores[i] = std::exp(logits[i] - largest);
    for (int64_t i = 0; i < n; ++i) scores[i] /= sum;
  } else {
    for (int64_t i = 0; i < n; ++i) scores[i] = 1.0f / (1.0f + std::exp(-logits[i]));
  }
  for (int64_t i = 0; i < n; ++i) choice[i] = scores[i] + (bias == nullptr ? 0.0f : bias[i]);
  return config.num_groups > 1 ? LimitGroups(config, choice) : std::numeric_limits<float>::infinity();
}

}  // namespace

void ChooseExperts(const MoeConfig& config, const float* logits, const float* bias, int32_t* experts, float* weights,
                   float* scratch) {
  const int64_t n = config.num_experts;
  float* scores = scratch;
  float* choice = scratch + n;
  ScoreExperts(config, logits, bias, scores, choice);

  float sum = 0;
  for (int64_t k = 0; k < config.experts_per_token; ++k) {
    // A NaN is never larger: a broken token still gets experts, and its output tells.
    int64_t best = 0;
    for (int64_t i = 1; i < n; ++i) {
      if (choice[i] > choice[best]) best = i;
    }
    experts[k] = static_cast<int32_t>(best);
    weights[k] = scores[best];
    sum += scores[best];
    choice[best] = kExcluded;
  }
  const float norm = config.norm_topk ? sum + 1e-20f : 1.0f;
  for (int64_t k = 0; k < config.experts_per_token; ++k) {
    weights[k] = weights[k] / norm * static_cast<float>(config.routed_scaling);
  }
}

float ChoiceMargin(const MoeConfig& config, const float* logits, const float* bias, float* scratch) {
  const int64_t n = config.num_experts;
  float* choice = scratch + n;
  const float groups = ScoreExperts(config, logits, bias, scratch, choice);
  if (config.experts_per_token >= n) return groups;
  const auto last_in = choice + config.experts_per_token - 1;
  std::nth_element(choice, last_in, choice + n, std::greater<>());
  const float best_out = *std::max_element(last_in + 1, choice + n);
  return best_out == kExcluded ? groups : std::min(groups, *last_in - best_out);
}

}  // namespace weft
