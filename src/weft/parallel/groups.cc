#include "weft/parallel/groups.h"

#include <numeric>

#include "weft/core/error.h"
#include "weft/core/function_ref.h"

namespace weft {
namespace {

using MakeGroup = FunctionRef<std::vector<std::unique_ptr<Communicator>>(const std::vector<int32_t>& members)>;

// Makes every group of one kind once, when its first member is met, and hands its ends out.
void MakeKind(const cp::ParallelConfig& config, MakeGroup make, std::vector<RankGroups>& ranks,
              std::vector<int32_t> (*group_of)(const cp::ParallelConfig&, int32_t),
              std::unique_ptr<Communicator> RankGroups::*kind) {
  for (int32_t rank = 0; rank < config.WorldSize(); ++rank) {
    const std::vector<int32_t> members = group_of(config, rank);
    if (members.front() != rank) continue;
    auto group = make(members);
    for (size_t i = 0; i < members.size(); ++i) {
      auto& end = ranks[static_cast<size_t>(members[i])].*kind;
      WEFT_CHECK(end == nullptr, "rank {} is in two groups of a kind", members[i]);
      end = std::move(group[i]);
    }
  }
}

std::vector<int32_t> WorldGroup(const cp::ParallelConfig& config, int32_t) {
  std::vector<int32_t> all(static_cast<size_t>(config.WorldSize()));
  std::iota(all.begin(), all.end(), 0);
  return all;
}

std::vector<RankGroups> MakeGroups(const cp::ParallelConfig& config, MakeGroup make) {
  std::vector<RankGroups> ranks(static_cast<size_t>(config.WorldSize()));
  for (int32_t rank = 0; rank < config.WorldSize(); ++rank)
    ranks[static_cast<size_t>(rank)].coord = CoordOf(config, rank);
  MakeKind(config, make, ranks, WorldGroup, &RankGroups::world);
  MakeKind(config, make, ranks, cp::TpGroup, &RankGroups::tp);
  MakeKind(config, make, ranks, cp::PcpGroup, &RankGroups::pcp);
  MakeKind(config, make, ranks, cp::DcpGroup, &RankGroups::dcp);
  MakeKind(config, make, ranks, cp::CpGroup, &RankGroups::cp);
  return ranks;
}

}  // namespace

void RankGroups::Abort() {
  for (Communicator* group : {world.get(), tp.get(), pcp.get(), dcp.get(), cp.get()}) {
    if (group != nullptr) group->Abort();
  }
}

std::vector<RankGroups> MakeThreadGroups(const cp::ParallelConfig& config) {
  return MakeGroups(
      config, [](const std::vector<int32_t>& members) { return MakeInProcessGroup(static_cast<int>(members.size())); });
}

std::vector<RankGroups> MakeProcessGroups(const cp::ParallelConfig& config, Processes& processes) {
  const int32_t world = config.WorldSize();
  if (world % processes.size() != 0) {
    Throw(
        "{} processes: must divide the number of ranks, {} (= --data-parallel-size {} x "
        "--prefill-context-parallel-size {} x --tensor-parallel-size {})",
        processes.size(), world, config.data_parallel, config.prefill_context_parallel, config.tensor_parallel);
  }
  const int32_t here = world / processes.size();
  return MakeGroups(config, [&](const std::vector<int32_t>& members) {
    std::vector<int> process_of;
    for (const int32_t rank : members) process_of.push_back(rank / here);
    return processes.MakeGroup(process_of);
  });
}

void AbortAll(std::span<RankGroups> ranks) {
  for (RankGroups& rank : ranks) rank.Abort();
}

}  // namespace weft
