#include <algorithm>
#include <iostream>

#include "weft/cli/build_engine.h"
#include "weft/cli/commands.h"
#include "weft/cli/layout_report.h"
#include "weft/core/log.h"
#include "weft/model/checkpoint.h"
#include "weft/model/model_path.h"
#include "weft/runner/executor.h"
#include "weft/runner/step_costs.h"

namespace weft::cli {
namespace {

class InspectLayout : public Command {
 public:
  InspectLayout()
      : options_(
            "weft inspect layout",
            "Draws what a layout does with one prompt: which rank holds which tokens and heads, and which computes "
            "which tokens. With a model also in bytes; without one a model is assumed whose heads fit.",
            "[MODEL]", &model_) {
    EngineArgs& a = args_;
    options_.Group("Parallelism");
    DeclareLayoutOptions(options_, a);
    options_.Add("block-size", &a.block_size, "Tokens of a block on one shard.").Range(1, 65536);
    options_.Group("Model");
    options_.Add("hf-overrides", &a.hf_overrides, "Replaces fields of config.json: a JSON object, or dotted keys.");
    options_.Add("kv-cache-dtype", &a.kv_cache_dtype, "Type of keys and values. `auto`: bfloat16.")
        .Choices({"auto", "bfloat16", "float32"});
    options_.Group("Prompt");
    options_.Add("prompt-tokens", &prompt_tokens_, "Tokens of the prompt.").HumanReadable().Range(1);
    options_.Add("cached-tokens", &cached_tokens_, "So many of them are found in the prefix cache.")
        .HumanReadable()
        .Range(0);
    options_.Add("max-num-batched-tokens", &step_tokens_, "Tokens that are computed in one step.")
        .HumanReadable()
        .Range(1, INT32_MAX);
    options_.Group("Output");
    options_.Add("json", &json_, "One JSON object instead of text; ranges are [first, behind the last].");
  }

  OptionSet& options() override { return options_; }

  int Run() override {
    InitLogging("warning");
    LayoutQuery query;
    query.parallel = ParallelConfigOf(args_);
    query.prompt_tokens = prompt_tokens_;
    query.cached_tokens = cached_tokens_;
    query.tokens_per_step = step_tokens_;
    const int64_t min_tokens = PcpMinTokensOf(args_);
    if (model_.empty()) {
      // The fewest heads for this grid: each DCP group, or each rank, has a KV head of its own.
      query.heads = {.heads = query.parallel.tensor_parallel,
                     .kv_heads = std::max(1, query.parallel.tensor_parallel / query.parallel.decode_context_parallel)};
      query.costs = QueryCostsOf({}, min_tokens);
      query.costs.per_token = 1;
    } else {
      const auto checkpoint = OpenCheckpoint(ResolveModelPath(model_), args_.hf_overrides);
      const ModelConfig& config = checkpoint->config();
      query.heads = {.heads = static_cast<int32_t>(config.num_heads),
                     .kv_heads = static_cast<int32_t>(config.num_kv_heads),
                     .mla = config.mla.has_value()};
      cp::Validate(query.parallel, query.heads);
      query.costs = QueryCostsOf(config, min_tokens);
      const DType dtype = args_.kv_cache_dtype == "float32" ? DType::kF32 : DType::kBF16;
      query.kv_token_bytes = VirtualBlockBytes(config, query.parallel, dtype) / query.parallel.WorldSize() *
                             query.parallel.data_parallel / query.parallel.block_tokens;
    }
    const LayoutReport report = MakeLayoutReport(query);
    std::cout << (json_ ? JsonOf(report).dump(1) + "\n" : TextOf(report));
    return 0;
  }

 private:
  std::string model_;
  EngineArgs args_;
  int64_t prompt_tokens_ = 1024;
  int64_t cached_tokens_ = 0;
  int64_t step_tokens_ = 2048;
  bool json_ = false;
  OptionSet options_;
};

}  // namespace

std::unique_ptr<Command> MakeInspectLayout() { return std::make_unique<InspectLayout>(); }

}  // namespace weft::cli
