#pragma once
#include <optional>
#include <string>
#include <vector>

#include "weft/api/openai_request.h"
#include "weft/api/sampling_params.h"
#include "weft/core/options.h"

namespace weft::cli {

// The sampling options of `generate` and `chat`.
struct SamplingArgs {
  int64_t max_tokens = 256;
  int64_t min_tokens = 0;
  std::optional<double> temperature;
  std::optional<double> top_p;
  std::optional<int64_t> top_k;
  std::optional<double> min_p;
  std::optional<double> repetition_penalty;
  double presence_penalty = 0;
  double frequency_penalty = 0;
  std::optional<int64_t> request_seed;
  std::vector<std::string> stop;
  bool ignore_eos = false;
};

void DeclareSamplingOptions(OptionSet& options, SamplingArgs& args);

// What the options leave open comes from `defaults`, else from SamplingParams.
SamplingParams MakeSamplingParams(const SamplingArgs& args, const SamplingDefaults& defaults);

}  // namespace weft::cli
