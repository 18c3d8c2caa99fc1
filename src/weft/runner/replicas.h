#pragma once
// Several replicas of a model in one process (--data-parallel-size).

#include <memory>
#include <vector>

#include "weft/runner/executor.h"

namespace weft {

// One executor for each of options.parallel.data_parallel replicas, for one thread each. Each replica has ranks and KV
// caches of its own; they share one copy of the weights. options.num_blocks is for each, options.kv_cache_bytes and
// threads_per_rank = 0 divide among the ranks of all.
//
// Without expert parallelism every replica steps at its own pace. With it the experts are spread over the ranks of all
// replicas, which step together (ShareSteps): a replica without requests runs its experts for the others. When a rank
// fails all replicas that step with it fail.
//
// Throws weft::Error as MakeThreadExecutor.
std::vector<std::unique_ptr<StepExecutor>> MakeReplicaExecutors(const ExecutorOptions& options,
                                                                std::shared_ptr<const Checkpoint> checkpoint);

}  // namespace weft
