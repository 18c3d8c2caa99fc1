// The conformance suite on ranks that live in several processes. Run by mpirun: every process runs all tests, in the
// same order.

#include <algorithm>
#include <array>
#include <random>

#include "weft/parallel/conformance_test.h"
#include "weft/parallel/groups.h"
#include "weft/parallel/mpi_test_main.h"
#include "weft/parallel/rank_threads.h"

namespace weft {
namespace {

// Longer than any test takes, shorter than ctest's patience: a hang becomes a message.
constexpr double kLimitSeconds = 60;

using testing::everybody;

// Which process each member lives in.
enum class Mapping { kConsecutive, kCyclic, kUneven };

std::vector<int> ProcessOf(Mapping mapping, int threads) {
  const int processes = everybody->size();
  std::vector<int> process_of;
  if (mapping == Mapping::kUneven) {
    // One in the first, two in the second; none in others, which the suite does not expect.
    return {0, 1, 1};
  }
  for (int i = 0; i < processes * threads; ++i) {
    process_of.push_back(mapping == Mapping::kConsecutive ? i / threads : i % processes);
  }
  return process_of;
}

CommunicatorFactory Mpi(std::string name, Mapping mapping, int threads) {
  const std::vector<int> process_of = ProcessOf(mapping, threads);
  const auto run = [process_of](const std::function<void(Communicator&)>& member) {
    const auto processes = Processes::Join();
    processes->SetDeadline(Processes::Clock::now() + std::chrono::seconds(static_cast<int>(kLimitSeconds)),
                           kLimitSeconds);
    auto group = processes->MakeGroup(process_of);
    std::vector<Communicator*> here;
    for (const auto& comm : group) {
      if (comm != nullptr) here.push_back(comm.get());
    }
    EXPECT_EQ(static_cast<ptrdiff_t>(here.size()), std::count(process_of.begin(), process_of.end(), processes->rank()));
    RankThreads threads_here(static_cast<int>(here.size()), [&] { here[0]->Abort(); });
    threads_here.RunOnAll([&](int i) { member(*here[static_cast<size_t>(i)]); });
  };
  return {.name = std::move(name),
          .size = static_cast<int>(process_of.size()),
          .seed = testing::CommonSeed(std::random_device()()),
          .run = run};
}

std::vector<CommunicatorFactory> Factories() {
  std::vector<CommunicatorFactory> factories;
  const auto named = [](const char* what, int threads) {
    return fmt::format("{}_{}x{}", what, everybody->size(), threads);
  };
  factories.push_back(Mpi(named("consecutive", 1), Mapping::kConsecutive, 1));
  factories.push_back(Mpi(named("consecutive", 2), Mapping::kConsecutive, 2));
  factories.push_back(Mpi(named("cyclic", 2), Mapping::kCyclic, 2));
  if (everybody->size() == 2) factories.push_back(Mpi("uneven_1_2", Mapping::kUneven, 0));
  return factories;
}

INSTANTIATE_TEST_SUITE_P(Mpi, CommunicatorConformance, ::testing::ValuesIn(Factories()),
                         [](const auto& test) { return test.param.name; });

TEST(Processes, MessagesComeInOrderAndWhole) {
  std::mt19937_64 random(testing::CommonSeed(std::random_device()()));
  const auto processes = Processes::Join();
  for (int round = 0; round < 20; ++round) {
    std::vector<std::vector<std::byte>> given;
    for (int p = 0; p < processes->size(); ++p) {
      const size_t sizes[] = {0, random() % 100, random() % 200'000};
      given.emplace_back(sizes[random() % 3]);
      for (std::byte& b : given.back()) b = static_cast<std::byte>(random());
    }
    EXPECT_EQ(processes->AllGather(given[static_cast<size_t>(processes->rank())]), given);
  }
}

// A process that says it has failed frees the ones that wait for it, with its words.
TEST(Processes, FailureReachesEverybodyWithItsReason) {
  const auto processes = Processes::Join();
  EXPECT_EQ(processes->Failure(), "");
  processes->AllGather({});
  if (processes->rank() == processes->size() - 1) {
    processes->Fail("the last process is out of luck");
    EXPECT_THROW(processes->Send(0, {}), Error);
  } else {
    try {
      processes->Receive(processes->size() - 1);
      FAIL() << "nothing was sent";
    } catch (const Error& e) {
      EXPECT_EQ(std::string(e.what()), "the last process is out of luck");
      EXPECT_EQ(e.kind(), ErrorKind::kInternal);
    }
  }
  EXPECT_EQ(processes->Failure(), "the last process is out of luck");
}

// Nobody answers process 0, and all are told.
TEST(Processes, DeadlineEndsAWait) {
  const auto processes = Processes::Join();
  const auto again = Processes::Join();
  std::string said;
  try {
    if (processes->rank() == 0) {
      processes->SetDeadline(Processes::Clock::now() + std::chrono::milliseconds(50), 0.05);
      processes->Receive(1);
    } else {
      processes->Receive(0);
    }
  } catch (const Error& e) {
    said = e.what();
  }
  EXPECT_NE(said.find("no answer from process 1"), std::string::npos) << said;
  EXPECT_NE(said.find("0.05 s"), std::string::npos) << said;
  // The failure is that party's alone.
  EXPECT_EQ(again->Failure(), "");
  EXPECT_EQ(again->AllGather({}).size(), static_cast<size_t>(again->size()));
}

// Ranks of the grid in order over the processes; every group joins whom the grid says, across processes or not.
TEST(Processes, GroupsOfTheGrid) {
  const int processes_n = everybody->size();
  for (const auto& [pcp, dcp, tp] : {std::array{1, 1, 4}, {2, 1, 2}, {4, 1, 1}, {2, 2, 4}}) {
    const cp::ParallelConfig config{
        .prefill_context_parallel = pcp, .decode_context_parallel = dcp, .tensor_parallel = tp};
    const auto processes = Processes::Join();
    processes->SetDeadline(Processes::Clock::now() + std::chrono::seconds(60), 60);
    std::vector<RankGroups> ranks = MakeProcessGroups(config, *processes);
    ASSERT_EQ(ranks.size(), static_cast<size_t>(config.WorldSize()));
    const int here = config.WorldSize() / processes_n;
    const int first = here * processes->rank();
    RankThreads threads(here, [&] { AbortAll(ranks); });
    threads.RunOnAll([&](int thread) {
      const int rank = first + thread;
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
        const bool one_process = want.front() / here == want.back() / here;
        EXPECT_EQ(comm.shares_memory(), one_process);
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
    for (int r = 0; r < config.WorldSize(); ++r) {
      EXPECT_EQ(ranks[static_cast<size_t>(r)].world != nullptr, r / here == processes->rank());
    }
  }
  EXPECT_THROW(MakeProcessGroups({.tensor_parallel = processes_n + 1}, *everybody), Error);
}

TEST(Processes, GroupsInsideOneProcessShareMemory) {
  const auto processes = Processes::Join();
  for (int home = 0; home < processes->size(); ++home) {
    const std::vector<int> all_there(2, home);
    const auto group = processes->MakeGroup(all_there);
    ASSERT_EQ(group.size(), 2u);
    EXPECT_EQ(group[0] != nullptr, home == processes->rank());
    if (home == processes->rank()) {
      EXPECT_TRUE(group[1]->shares_memory());
    }
  }
}

}  // namespace
}  // namespace weft

int main(int argc, char** argv) { return weft::testing::MpiTestMain(argc, argv); }
