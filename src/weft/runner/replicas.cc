#include "weft/runner/replicas.h"

#include <utility>

#include "weft/core/thread_pool.h"
#include "weft/parallel/groups.h"
#include "weft/runner/joint_steps.h"
#include "weft/runner/rank_host.h"

namespace weft {
namespace {

class JointThreads : public JointExecutor {
 public:
  explicit JointThreads(std::unique_ptr<RankHost> host) : host_(std::move(host)) {}

  std::vector<StepOutput> Execute(std::span<const StepPlan* const> plans) override {
    RankHost::Outputs found = host_->Step(plans);
    std::vector<StepOutput> outputs(plans.size());
    for (size_t i = 0; i < plans.size(); ++i) {
      if (plans[i] != nullptr) outputs[i] = MergeOutputs(*plans[i], std::move(found[i]));
    }
    return outputs;
  }
  int64_t num_blocks() const override { return host_->num_blocks(); }
  std::vector<int64_t> ExpertLoad(size_t replica) const override { return host_->ExpertLoad(replica); }
  ContextCounts Context(size_t replica) const override { return host_->Context(replica); }

 private:
  const std::unique_ptr<RankHost> host_;
};

// One of the replicas that step alone.
class ReplicaExecutor : public StepExecutor {
 public:
  ReplicaExecutor(std::shared_ptr<RankHost> host, size_t replica, size_t replicas)
      : host_(std::move(host)), replica_(replica), replicas_(replicas) {}

  StepOutput Execute(const StepPlan& plan) override {
    std::vector<const StepPlan*> plans(replicas_);
    plans[replica_] = &plan;
    return MergeOutputs(plan, std::move(host_->Step(plans)[replica_]));
  }
  int64_t num_blocks() const override { return host_->num_blocks(); }
  std::vector<int64_t> ExpertLoad() const override { return host_->ExpertLoad(replica_); }
  ContextCounts Context() const override { return host_->Context(replica_); }

 private:
  const std::shared_ptr<RankHost> host_;
  const size_t replica_;
  const size_t replicas_;
};

}  // namespace

std::vector<std::unique_ptr<StepExecutor>> MakeReplicaExecutors(const ExecutorOptions& options,
                                                                std::shared_ptr<const Checkpoint> checkpoint) {
  ValidateLayout(options.parallel, checkpoint->config());
  const auto replicas = static_cast<size_t>(options.parallel.data_parallel);
  auto host =
      std::make_unique<RankHost>(options, std::move(checkpoint), MakeThreadGroups(options.parallel), AllowedCpus());
  if (host->steps_together() && replicas > 1)
    return ShareSteps(std::make_unique<JointThreads>(std::move(host)), replicas);
  const std::shared_ptr<RankHost> shared = std::move(host);
  std::vector<std::unique_ptr<StepExecutor>> executors;
  for (size_t i = 0; i < replicas; ++i) executors.push_back(std::make_unique<ReplicaExecutor>(shared, i, replicas));
  return executors;
}

}  // namespace weft
