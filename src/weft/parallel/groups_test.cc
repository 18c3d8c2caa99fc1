#include "weft/parallel/groups.h"

#include <gtest/gtest.h>

#include <array>

#include "weft/core/error.h"
#include "weft/parallel/rank_threads.h"

namespace weft {
namespace {

TEST(ThreadGroups, EveryGroupJoinsTheRanksThatTheGridSays) {
  const std::array<std::array<int32_t, 4>, 6> grids = {
      {{1, 1, 1, 1}, {1, 2, 1, 2}, {1, 2, 2, 4}, {1, 1, 4, 8}, {2, 2, 2, 2}, {1, 3, 2, 2}}};
  for (const auto& [dp, pcp, dcp, tp] : grids) {
    const cp::ParallelConfig config{
        .data_parallel = dp, .prefill_context_parallel = pcp, .decode_context_parallel = dcp, .tensor_parallel = tp};
    std::vector<RankGroups> ranks = MakeThreadGroups(config);
    ASSERT_EQ(ranks.size(), static_cast<size_t>(config.WorldSize()));
    RankThreads threads(config.WorldSize(), [&] { AbortAll(ranks); });
    threads.RunOnAll([&](int rank) {
      RankGroups& groups = ranks[static_cast<size_t>(rank)];
      EXPECT_EQ(groups.coord.rank, rank);
      const auto check = [&](Communicator& comm, const std::vector<int32_t>& want, int index) {
        EXPECT_EQ(comm.rank(), index);
        const int32_t mine = rank;
        std::vector<std::span<const int32_t>> views;
        comm.AllGather(std::span(&mine, 1), views);
        std::vector<int32_t> members;
        for (const auto& view : views) members.push_back(view[0]);
        EXPECT_EQ(members, want);
        comm.Release();
      };
      std::vector<int32_t> world;
      for (int32_t r = 0; r < config.WorldSize(); ++r) world.push_back(r);
      check(*groups.world, world, rank);
      check(*groups.tp, TpGroup(config, rank), groups.coord.tp);
      check(*groups.pcp, PcpGroup(config, rank), groups.coord.pcp);
      check(*groups.dcp, DcpGroup(config, rank), groups.coord.dcp);
      check(*groups.cp, CpGroup(config, rank), groups.coord.kv_shard);
    });
  }
}

// Ranks wait for a failed one in different groups; all of them are freed.
TEST(ThreadGroups, AbortAllFreesEveryGroup) {
  const cp::ParallelConfig config{.prefill_context_parallel = 2, .decode_context_parallel = 2, .tensor_parallel = 4};
  std::vector<RankGroups> ranks = MakeThreadGroups(config);
  RankThreads threads(config.WorldSize(), [&] { AbortAll(ranks); });
  std::atomic<int> freed{0};
  EXPECT_THROW(threads.RunOnAll([&](int rank) {
    RankGroups& groups = ranks[static_cast<size_t>(rank)];
    if (rank == 5) throw Error("rank 5 broke");
    try {
      Communicator* waits[] = {groups.world.get(), groups.tp.get(), groups.cp.get()};
      waits[rank % 3]->Barrier();
      groups.world->Barrier();
    } catch (const Error&) {
      ++freed;
      throw;
    }
  }),
               Error);
  EXPECT_EQ(freed.load(), 7);
}

}  // namespace
}  // namespace weft
