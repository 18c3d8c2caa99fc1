#include "weft/cli/sampling_args.h"

namespace weft::cli {

void DeclareSamplingOptions(OptionSet& options, SamplingArgs& a) {
  constexpr const char kModels[] = "generation_config.json's, else off";
  options.Group("Sampling");
  options.Add("max-tokens", &a.max_tokens, "The most tokens to generate.").HumanReadable().Range(1, INT32_MAX);
  options.Add("min-tokens", &a.min_tokens, "Tokens before which the model cannot stop.").Range(0, INT32_MAX);
  options.Add("temperature", &a.temperature, "0: always the most likely token.")
      .Range(0)
      .DefaultText("generation_config.json's, else 1");
  options.Add("top-p", &a.top_p, "Only the most likely tokens that together have this probability.")
      .Range(0, 1)
      .DefaultText(kModels);
  options.Add("top-k", &a.top_k, "Only so many most likely tokens; 0: all.").Range(-1, INT32_MAX).DefaultText(kModels);
  options.Add("min-p", &a.min_p, "Only tokens that have this share of the most likely one's probability.")
      .Range(0, 1)
      .DefaultText(kModels);
  options.Add("repetition-penalty", &a.repetition_penalty, "Above 1: tokens seen before become less likely.")
      .Range(0)
      .DefaultText(kModels);
  options.Add("presence-penalty", &a.presence_penalty, "Lowers the logits of generated tokens once.").Range(-2, 2);
  options.Add("frequency-penalty", &a.frequency_penalty, "Lowers them once per occurrence.").Range(-2, 2);
  options.Add("sampling-seed", &a.request_seed, "Makes the answer repeatable.").Range(0).DefaultText("by --seed");
  options.Add("stop", &a.stop, "Strings at which to stop; they are not shown.");
  options.Add("ignore-eos", &a.ignore_eos, "Go on after the model's end token.");
}

SamplingParams MakeSamplingParams(const SamplingArgs& a, const SamplingDefaults& defaults) {
  SamplingParams p;
  const auto real = [](float& target, const std::optional<double>& given, const std::optional<float>& fallback) {
    if (given) {
      target = static_cast<float>(*given);
    } else if (fallback) {
      target = *fallback;
    }
  };
  real(p.temperature, a.temperature, defaults.temperature);
  real(p.top_p, a.top_p, defaults.top_p);
  real(p.min_p, a.min_p, defaults.min_p);
  real(p.repetition_penalty, a.repetition_penalty, defaults.repetition_penalty);
  p.top_k = a.top_k ? static_cast<int32_t>(*a.top_k) : defaults.top_k.value_or(p.top_k);
  p.presence_penalty = static_cast<float>(a.presence_penalty);
  p.frequency_penalty = static_cast<float>(a.frequency_penalty);
  if (a.request_seed) p.seed = static_cast<uint64_t>(*a.request_seed);
  p.stop = a.stop;
  p.ignore_eos = a.ignore_eos;
  p.max_tokens = static_cast<int32_t>(a.max_tokens);
  p.min_tokens = static_cast<int32_t>(a.min_tokens);
  return p;
}

}  // namespace weft::cli
