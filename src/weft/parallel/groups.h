#pragma once
// The groups that each rank talks in, made from the rank grid.

#include <memory>
#include <span>
#include <vector>

#include "weft/cp/grid.h"
#include "weft/parallel/communicator.h"
#include "weft/parallel/processes.h"

namespace weft {

// One rank's place in the grid and its end of each of its groups. A member's index in a group is what cp/grid.h says.
struct RankGroups {
  cp::RankCoord coord;
  std::unique_ptr<Communicator> world;  // all ranks; index = rank
  std::unique_ptr<Communicator> tp;     // index = tp
  std::unique_ptr<Communicator> pcp;    // index = pcp
  std::unique_ptr<Communicator> dcp;    // index = dcp
  std::unique_ptr<Communicator> cp;     // index = kv_shard

  // Every collective of these groups, pending or later, throws in every member. Thread-safe. Nothing for a rank that
  // lives elsewhere.
  void Abort();
};

// Element i for rank i of a world of threads. The config must have passed cp::Validate.
std::vector<RankGroups> MakeThreadGroups(const cp::ParallelConfig& config);

// The same for ranks that live in several processes: each holds WorldSize() / size of them, consecutive ones, in order.
// Element i for rank i; those that live elsewhere have a coord and no groups. Collective over the processes. Throws
// weft::Error where the processes do not divide the ranks.
std::vector<RankGroups> MakeProcessGroups(const cp::ParallelConfig& config, Processes& processes);

// For RankThreads' on_error: no rank is left waiting for one that failed. Thread-safe.
void AbortAll(std::span<RankGroups> ranks);

}  // namespace weft
