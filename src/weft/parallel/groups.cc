#include "weft/parallel/groups.h"

#include <numeric>

#include "weft/core/error.h"

namespace weft {
namespace {

// Makes every group of one kind once, when its first member is met, and hands its ends out.
void MakeKind(const cp::ParallelConfig& config, std::vector<RankGroups>& ranks,
              std::vector<int32_t> (*group_of)(const cp::ParallelConfig&, int32_t),
              std::unique_ptr<Communicator> RankGroups::*kind) {
  for (int32_t rank = 0; rank < config.WorldSize(); ++rank) {
    const std::vector<int32_t> members = group_of(config, rank);
    if (members.front() != rank) continue;
    auto group = MakeInProcessGroup(static_cast<int>(members.size()));
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

}  // namespace

void RankGroups::Abort() {
  for (Communicator* group : {world.get(), tp.get(), pcp.get(), dcp.get(), cp.get()}) group->Abort();
}

std::vector<RankGroups> MakeThreadGroups(const cp::ParallelConfig& config) {
  std::vector<RankGroups> ranks(static_cast<size_t>(config.WorldSize()));
  for (int32_t rank = 0; rank < config.WorldSize(); ++rank)
    ranks[static_cast<size_t>(rank)].coord = CoordOf(config, rank);
  MakeKind(config, ranks, WorldGroup, &RankGroups::world);
  MakeKind(config, ranks, cp::TpGroup, &RankGroups::tp);
  MakeKind(config, ranks, cp::PcpGroup, &RankGroups::pcp);
  MakeKind(config, ranks, cp::DcpGroup, &RankGroups::dcp);
  MakeKind(config, ranks, cp::CpGroup, &RankGroups::cp);
  return ranks;
}

void AbortAll(std::span<RankGroups> ranks) {
  for (RankGroups& rank : ranks) rank.Abort();
}

}  // namespace weft
