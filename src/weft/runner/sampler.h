#pragma once
// From logits to the next token, in the order of vLLM's sampler: allowed tokens, bad words, minimum length, logit bias,
// repetition / frequency / presence penalties, temperature, min-p, top-k, top-p, softmax.

#include <cstdint>
#include <span>
#include <vector>

#include "weft/api/request.h"
#include "weft/api/sampling_params.h"
#include "weft/kernels/table.h"

namespace weft {

// Everything before the temperature, in place on [vocab] logits. Forbidden tokens become -inf.
void ApplyLogitsProcessors(const SamplingParams& params, std::span<const int32_t> prompt,
                           std::span<const int32_t> output, std::span<float> logits);

// Temperature and filters, then softmax, in place: the probabilities to draw from. Greedy (temperature < 1e-5) gives a
// one-hot vector; the filters do not apply.
void LogitsToProbabilities(const SamplingParams& params, std::span<float> logits, const KernelTable& kernels);

// The token whose share of the cumulated probabilities holds `uniform` in [0, 1).
int32_t DrawToken(std::span<const float> probabilities, double uniform);

// The log-probability and rank of `chosen` and the `top` most likely tokens (-1: all), from raw logits, as log-softmax.
// rank = the number of tokens at least as likely, itself included.
PositionLogprobs LogprobsOf(std::span<const float> logits, int32_t chosen, int32_t top, const KernelTable& kernels);

// The next token of a request with this prompt and output. Destroys `logits`. Returns -1 where they are not numbers
// or nothing is left to choose from.
int32_t SampleToken(const SamplingParams& params, uint64_t seed, std::span<const int32_t> prompt,
                    std::span<const int32_t> output, std::span<float> logits, const KernelTable& kernels);

}  // namespace weft
