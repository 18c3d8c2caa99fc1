#pragma once
// A command that mpirun has started in several processes: process 0 does what the command says, the others run ranks
// for it.

#include <memory>
#include <string>
#include <vector>

#include "weft/cli/engine_args.h"
#include "weft/cli/kv_size.h"
#include "weft/cp/grid.h"
#include "weft/parallel/processes.h"

namespace weft::cli {

// Null where this process is the only one. Collective. Marks the log lines of all but process 0. Throws weft::Error:
// this program has no MPI; --nnodes and the like ask for what mpirun has not been told (the message has its line).
std::shared_ptr<Processes> JoinProcesses(const EngineArgs& args);

// What falls to this host of the memory that all ranks take together.
struct HostShare {
  double ranks = 1;    // of those of the world
  double weights = 1;  // copies of the weights: processes share none, and each holds what its ranks need
};
HostShare ShareOfHost(const cp::ParallelConfig& parallel, const Processes& processes);

// Each process sizes for its host; the smallest holds for all. Collective.
KvSize SizeKvCacheOfAll(KvSizeInput input, const HostShare& share, Processes& processes);

// The end of the program after `status`: ends the other processes in an orderly way, or, with a status that is not 0,
// in whatever state they are; `why` is for them to tell. Returns the exit status. Nothing without MPI.
int FinishProcesses(int status, const std::string& why = {});

// The command line that starts this one over `processes` processes: `argv` without the options that mpirun replaces.
std::string MpirunLine(const std::vector<std::string>& argv, int processes);

}  // namespace weft::cli
