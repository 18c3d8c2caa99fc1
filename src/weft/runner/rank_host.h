#pragma once
// The ranks that live in this process: their threads, weights and KV caches, and what they know of the requests.

#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "weft/core/thread_pool.h"
#include "weft/kernels/table.h"
#include "weft/model/transformer.h"
#include "weft/parallel/groups.h"
#include "weft/parallel/rank_threads.h"
#include "weft/runner/executor.h"
#include "weft/runner/model_runner.h"
#include "weft/runner/request_table.h"

namespace weft {

class RankHost {
 public:
  // `groups`: element i for rank i of the world; the ranks that have groups live here. `cpus` are those that this
  // process may use for itself. `on_failure` is told what a rank threw, before its groups are aborted. Loads the
  // weights that these ranks need. Collective over the world. Throws weft::Error: an illegal layout, a missing tensor,
  // too little memory for a single block.
  RankHost(const ExecutorOptions& options, std::shared_ptr<const Checkpoint> checkpoint, std::vector<RankGroups> groups,
           std::vector<int> cpus, std::function<void(const std::string&)> on_failure = {});
  ~RankHost();
  RankHost(const RankHost&) = delete;
  RankHost& operator=(const RankHost&) = delete;

  // By replica, what each of its ranks that live here found out.
  using Outputs = std::vector<std::vector<std::vector<RowOutput>>>;

  // Whether the replicas can only step together: they share experts, or processes.
  bool steps_together() const { return teams_.size() == 1; }
  // One step. plans[i]: what replica i does, null: nothing. Where the replicas step together all ranks that live here
  // take part, and this is collective over the world; else exactly one plan is given, its replica's ranks alone take
  // part, and other replicas may be stepped at the same time. Throws what the first rank that failed threw: the groups
  // of all ranks that took part are aborted then.
  Outputs Step(std::span<const StepPlan* const> plans);
  // Of a single replica.
  std::vector<std::vector<RowOutput>> Step(const StepPlan& plan);

  int64_t num_blocks() const { return num_blocks_; }
  // StepExecutor::ExpertLoad, of the replica's ranks that live here. Thread-safe.
  std::vector<int64_t> ExpertLoad(size_t replica) const;
  // StepExecutor::Context. Thread-safe.
  ContextCounts Context(size_t replica) const;

 private:
  struct Rank {
    std::unique_ptr<ThreadPool> joint_pool;
    std::unique_ptr<ThreadPool> pool;
    std::unique_ptr<KvCache> cache;
    std::unique_ptr<ModelRunner> runner;
  };

  // Ranks that step together.
  struct Team {
    int first = 0;  // the first one's index, the others follow
    std::unique_ptr<RankThreads> threads;
  };

  // Ranks of a replica, here or elsewhere.
  size_t replica_size() const { return groups_.size() / static_cast<size_t>(options_.parallel.data_parallel); }
  void MakeTeams();
  // contexts_ after a step of the team; work and deals by replica.
  void CountContext(const Team& team, std::span<const StepPlan* const> work, std::span<const StepDeal> deals);
  // expert_loads_ of the team's replicas. Between two runs of the team.
  void CountExpertLoad(const Team& team);
  // Runs f(index) for each rank of a team on its thread.
  void RunOnAll(Team& team, FunctionRef<void(int index)> f);
  void LoadAllWeights(const Checkpoint& checkpoint, int threads);
  // The CPUs of a rank's threads; none where there are not enough to pin. `index` is a rank's place in this process.
  std::vector<int> CpusOf(const std::vector<int>& cpus, int index) const;
  void MakePools(int index, const std::vector<int>& cpus);
  // batch_options_.rates and .messages, the same in all processes.
  void LearnRates();
  void MakeRank(int index);
  std::shared_ptr<const ExpertWeights> ExpertsOf(const cp::RankCoord& coord) const;
  RankGroups& GroupsOf(int index) { return groups_[static_cast<size_t>(here_[static_cast<size_t>(index)])]; }

  ExecutorOptions options_;
  ModelConfig config_;
  const KernelTable& kernels_;
  std::vector<RankGroups> groups_;  // by rank of the world
  std::vector<int> here_;           // the ranks that live here, ascending; an index into this is what follows
  BatchOptions batch_options_;
  std::vector<RequestTable> tables_;  // by replica
  int64_t num_blocks_;
  int threads_per_rank_ = 1;
  bool fits_ = false;                                          // every rank's threads can have CPUs of their own
  std::vector<std::shared_ptr<const ModelWeights>> weights_;   // by TP index; null where no rank here needs it
  std::vector<std::shared_ptr<const ExpertWeights>> experts_;  // by rank with expert parallelism, else by TP index
  std::shared_ptr<const RopeCache> rope_;
  std::function<void(const std::string&)> on_failure_;
  std::vector<std::unique_ptr<Rank>> ranks_;
  mutable std::mutex load_mutex_;
  std::vector<std::vector<int64_t>> expert_loads_;  // by replica, then expert; under load_mutex_
  std::vector<ContextCounts> contexts_;             // by replica; under load_mutex_
  std::vector<Team> teams_;                         // one of all ranks here; or one for each replica
};

}  // namespace weft
