#include "weft/runner/executor.h"

#include <utility>

#include "weft/core/error.h"
#include "weft/core/thread_pool.h"
#include "weft/parallel/groups.h"
#include "weft/runner/rank_host.h"

namespace weft {
namespace {

class ThreadExecutor : public StepExecutor {
 public:
  ThreadExecutor(const ExecutorOptions& options, std::shared_ptr<const Checkpoint> checkpoint)
      : host_(options, std::move(checkpoint), MakeThreadGroups(options.parallel), AllowedCpus()) {}

  StepOutput Execute(const StepPlan& plan) override { return MergeOutputs(plan, host_.Step(plan)); }
  int64_t num_blocks() const override { return host_.num_blocks(); }
  std::vector<int64_t> ExpertLoad() const override { return host_.ExpertLoad(0); }
  ContextCounts Context() const override { return host_.Context(0); }

 private:
  RankHost host_;
};

}  // namespace

void ValidateLayout(const cp::ParallelConfig& parallel, const ModelConfig& config) {
  cp::Validate(parallel, {.heads = static_cast<int32_t>(config.num_heads),
                          .kv_heads = static_cast<int32_t>(config.num_kv_heads),
                          .mla = config.mla.has_value()});
  if (parallel.expert_parallel && !config.moe) {
    throw Error(
        fmt::format("--enable-expert-parallel: must not be set for {}: the model has no experts", config.architecture),
        ErrorKind::kInvalidArgument, "--enable-expert-parallel");
  }
}

std::unique_ptr<StepExecutor> MakeThreadExecutor(const ExecutorOptions& options,
                                                 std::shared_ptr<const Checkpoint> checkpoint) {
  ValidateLayout(options.parallel, checkpoint->config());
  WEFT_CHECK(options.parallel.data_parallel == 1, "one executor is one replica");
  return std::make_unique<ThreadExecutor>(options, std::move(checkpoint));
}

}  // namespace weft
