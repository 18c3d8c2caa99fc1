#pragma once
// Runs steps on ranks that live in several processes. Process 0 plans, and has this executor; the others follow it.
//
// One message a step goes to every other process, the plan, the same to all: each derives from it what its ranks do.
// What they found out comes back to process 0. When a process fails, dies, or takes longer than the step's time limit,
// all of them fail with the first reason known.

#include <memory>
#include <vector>

#include "weft/parallel/processes.h"
#include "weft/runner/executor.h"

namespace weft {

// In process 0, while the others call FollowSteps with the same options. Between steps it looks after the others: see
// StepExecutor::SetFailureListener. Its destructor lets the followers go. Throws weft::Error: as MakeThreadExecutor;
// the processes do not divide the ranks, were started with different options, or one of them failed.
//
// One executor for each of options.parallel.data_parallel replicas, for one thread each; they step together
// (ShareSteps), with or without expert parallelism.
std::vector<std::unique_ptr<StepExecutor>> MakeMpiExecutors(const ExecutorOptions& options,
                                                            std::shared_ptr<const Checkpoint> checkpoint,
                                                            std::shared_ptr<Processes> processes);

// In every other process: makes its ranks and runs their part of every step, until process 0 lets it go. Throws
// weft::Error as above, and when any process has failed.
void FollowSteps(const ExecutorOptions& options, std::shared_ptr<const Checkpoint> checkpoint,
                 std::shared_ptr<Processes> processes);

// The CPUs that this process may use for itself: where others on this host may run on the very same ones, a share of
// them. Collective over the processes.
std::vector<int> OwnCpus(Processes& processes);

}  // namespace weft
