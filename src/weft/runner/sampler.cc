#include "weft/runner/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <unordered_map>

#include "weft/runner/random.h"

namespace weft {
namespace {

constexpr float kGreedyBelow = 1e-5f;
constexpr float kNegInf = -std::numeric_limits<float>::infinity();

void Forbid(std::span<const int32_t> tokens, std::span<float> logits) {
  for (const int32_t token : tokens) {
    if (token >= 0 && static_cast<size_t>(token) < logits.size()) logits[static_cast<size_t>(token)] = kNegInf;
  }
}

void AllowOnly(std::span<const int32_t> tokens, std::span<float> logits) {
  std::vector<bool> allowed(logits.size());
  for (const int32_t token : tokens) {
    if (token >= 0 && static_cast<size_t>(token) < logits.size()) allowed[static_cast<size_t>(token)] = true;
  }
  for (size_t i = 0; i < logits.size(); ++i) {
    if (!allowed[i]) logits[i] = kNegInf;
  }
}

void ApplyPenalties(const SamplingParams& params, std::span<const int32_t> prompt, std::span<const int32_t> output,
                    std::span<float> logits) {
  if (params.repetition_penalty == 1.0f && params.frequency_penalty == 0.0f && params.presence_penalty == 0.0f) return;
  std::unordered_map<int32_t, int32_t> output_count;
  for (const int32_t token : output) ++output_count[token];
  if (params.repetition_penalty != 1.0f) {
    auto penalise = [&](int32_t token) {
      float& x = logits[static_cast<size_t>(token)];
      x = x > 0 ? x * (1.0f / params.repetition_penalty) : x * params.repetition_penalty;
    };
    std::vector<bool> seen(logits.size());
    for (const auto tokens : {prompt, output}) {
      for (const int32_t token : tokens) {
        if (token < 0 || static_cast<size_t>(token) >= logits.size() || seen[static_cast<size_t>(token)]) continue;
        seen[static_cast<size_t>(token)] = true;
        penalise(token);
      }
    }
  }
  for (const auto& [token, count] : output_count) {
    if (token < 0 || static_cast<size_t>(token) >= logits.size()) continue;
    logits[static_cast<size_t>(token)] -= params.frequency_penalty * static_cast<float>(count);
    logits[static_cast<size_t>(token)] -= params.presence_penalty;
  }
}

// Keeps the logits that are at least as large as the k-th largest: ties with it all stay.
void KeepTopK(int64_t k, std::span<float> logits) {
  if (k <= 0 || static_cast<size_t>(k) >= logits.size()) return;
  std::vector<float> sorted(logits.begin(), logits.end());
  std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<>());
  const float kth = sorted[static_cast<size_t>(k - 1)];
  for (float& x : logits) {
    if (x < kth) x = kNegInf;
  }
}

// Drops the least likely tokens as long as what is dropped adds up to at most 1 - p. Seen from the top: a token stays
// while the probability of those above it is below p. Among equals the lower index goes first.
void KeepTopP(float p, std::span<float> logits, const KernelTable& kernels) {
  const float lse = kernels.log_sum_exp(logits.data(), static_cast<int64_t>(logits.size()));
  std::vector<int32_t> order;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] != kNegInf) order.push_back(static_cast<int32_t>(i));
  }
  auto above = [&](int32_t a, int32_t b) {
    const float x = logits[static_cast<size_t>(a)];
    const float y = logits[static_cast<size_t>(b)];
    return x != y ? x > y : a > b;
  };
  // Few tokens hold most of the mass: sorting grows from the top only as far as it has to.
  size_t sorted = 0;
  double mass = 0;
  size_t kept = 0;
  bool done = false;
  while (!done && sorted < order.size()) {
    const size_t next = std::min(order.size(), std::max<size_t>(64, sorted * 8));
    const auto begin = order.begin() + static_cast<std::ptrdiff_t>(sorted);
    const auto end = order.begin() + static_cast<std::ptrdiff_t>(next);
    if (end != order.end()) std::nth_element(begin, end, order.end(), above);
    std::sort(begin, end, above);
    for (; sorted < next && !done; ++sorted) {
      if (mass >= static_cast<double>(p) && kept > 0) {
        done = true;
      } else {
        mass += std::exp(static_cast<double>(logits[static_cast<size_t>(order[sorted])]) - static_cast<double>(lse));
        ++kept;
      }
    }
    if (!done) sorted = next;
  }
  for (size_t i = kept; i < order.size(); ++i) logits[static_cast<size_t>(order[i])] = kNegInf;
}

}  // namespace

void ApplyLogitsProcessors(const SamplingParams& params, std::span<const int32_t> prompt,
                           std::span<const int32_t> output, std::span<float> logits) {
  if (!params.allowed_token_ids.empty()) AllowOnly(params.allowed_token_ids, logits);
  for (const std::vector<int32_t>& word : params.bad_words) {
    if (word.empty() || word.size() - 1 > output.size()) continue;
    const auto tail = output.last(word.size() - 1);
    if (std::equal(tail.begin(), tail.end(), word.begin())) Forbid(std::span(word).last(1), logits);
  }
  if (static_cast<int64_t>(output.size()) < params.min_tokens) {
    Forbid(params.eos_token_ids, logits);
    Forbid(params.stop_token_ids, logits);
  }
  for (const auto& [token, bias] : params.logit_bias) {
    if (token >= 0 && static_cast<size_t>(token) < logits.size()) logits[static_cast<size_t>(token)] += bias;
  }
  ApplyPenalties(params, prompt, output, logits);
}

void LogitsToProbabilities(const SamplingParams& params, std::span<float> logits, const KernelTable& kernels) {
  const auto n = static_cast<int64_t>(logits.size());
  if (params.temperature < kGreedyBelow) {
    const int64_t best = kernels.argmax(logits.data(), n);
    std::fill(logits.begin(), logits.end(), 0.0f);
    logits[static_cast<size_t>(best)] = 1.0f;
    return;
  }
  if (params.temperature != 1.0f) {
    for (float& x : logits) x /= params.temperature;
  }
  if (params.min_p > 0.0f) {
    const float max = logits[static_cast<size_t>(kernels.argmax(logits.data(), n))];
    const float lowest = max + std::log(params.min_p);
    for (float& x : logits) {
      if (x < lowest) x = kNegInf;
    }
  }
  KeepTopK(params.top_k, logits);
  if (params.top_p < 1.0f) KeepTopP(params.top_p, logits, kernels);
  kernels.softmax(logits.data(), n);
}

int32_t DrawToken(std::span<const float> probabilities, double uniform) {
  double total = 0;
  for (const float p : probabilities) total += static_cast<double>(p);
  // Scaled by the true sum, so that rounding in the softmax cannot leave a gap at the end.
  const double target = uniform * total;
  double sum = 0;
  int32_t last = -1;
  for (size_t i = 0; i < probabilities.size(); ++i) {
    if (probabilities[i] <= 0.0f) continue;
    sum += static_cast<double>(probabilities[i]);
    last = static_cast<int32_t>(i);
    if (target < sum) break;
  }
  return last;
}

PositionLogprobs LogprobsOf(std::span<const float> logits, int32_t chosen, int32_t top, const KernelTable& kernels) {
  const auto n = static_cast<int64_t>(logits.size());
  const float lse = kernels.log_sum_exp(logits.data(), n);
  PositionLogprobs result;
  const float chosen_logit = logits[static_cast<size_t>(chosen)];
  result.chosen = {
      chosen, chosen_logit - lse,
      static_cast<int32_t>(std::count_if(logits.begin(), logits.end(), [&](float x) { return x >= chosen_logit; }))};
  const size_t count = top < 0 ? logits.size() : std::min(logits.size(), static_cast<size_t>(top));
  if (count == 0) return result;
  std::vector<int32_t> order(logits.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
  std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(count), order.end(),
                    [&](int32_t a, int32_t b) {
                      const float x = logits[static_cast<size_t>(a)];
                      const float y = logits[static_cast<size_t>(b)];
                      return x != y ? x > y : a < b;
                    });
  for (size_t i = 0; i < count; ++i) {
    result.top.push_back({order[i], logits[static_cast<size_t>(order[i])] - lse, static_cast<int32_t>(i + 1)});
  }
  return result;
}

int32_t SampleToken(const SamplingParams& params, uint64_t seed, std::span<const int32_t> prompt,
                    std::span<const int32_t> output, std::span<float> logits, const KernelTable& kernels) {
  ApplyLogitsProcessors(params, prompt, output, logits);
  const auto n = static_cast<int64_t>(logits.size());
  // NaN, +inf, or everything forbidden: all make the sum of the exponentials something else than a number.
  if (!std::isfinite(kernels.log_sum_exp(logits.data(), n))) return -1;
  if (params.temperature < kGreedyBelow) return static_cast<int32_t>(kernels.argmax(logits.data(), n));
  LogitsToProbabilities(params, logits, kernels);
  return DrawToken(logits, UniformAt(seed, output.size()));
}

}  // namespace weft
