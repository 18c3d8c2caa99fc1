#include <memory>
#include <set>

#include "weft/parallel/conformance_test.h"
#include "weft/parallel/rank_threads.h"

namespace weft {
namespace {

CommunicatorFactory InProcess(int size) {
  const auto run = [size](const std::function<void(Communicator&)>& member) {
    auto group = MakeInProcessGroup(size);
    RankThreads threads(size, [&] { group[0]->Abort(); });
    threads.RunOnAll([&](int rank) { member(*group[static_cast<size_t>(rank)]); });
  };
  return {.name = "threads_" + std::to_string(size), .size = size, .seed = std::random_device()(), .run = run};
}

INSTANTIATE_TEST_SUITE_P(InProcess, CommunicatorConformance,
                         testing::Values(InProcess(1), InProcess(2), InProcess(3), InProcess(4), InProcess(5),
                                         InProcess(6), InProcess(7), InProcess(8)),
                         [](const auto& test) { return test.param.name; });

// A gather of shared memory copies nothing: the view is the peer's own memory.
TEST(InProcessGroup, ViewsAreThePeersMemory) {
  InProcess(4).run([](Communicator& comm) {
    EXPECT_TRUE(comm.shares_memory());
    const int64_t mine = comm.rank();
    const int64_t address = reinterpret_cast<int64_t>(&mine);
    std::vector<std::span<const int64_t>> views, addresses;
    comm.AllGather(std::span(&mine, 1), views);
    std::set<const int64_t*> seen;
    for (int r = 0; r < comm.size(); ++r) {
      EXPECT_EQ(*views[static_cast<size_t>(r)].data(), r);
      seen.insert(views[static_cast<size_t>(r)].data());
    }
    EXPECT_EQ(views[static_cast<size_t>(comm.rank())].data(), &mine);
    EXPECT_EQ(seen.size(), 4u);
    comm.AllGather(std::span(&address, 1), addresses);
    for (size_t r = 0; r < 4; ++r) EXPECT_EQ(reinterpret_cast<int64_t>(views[r].data()), *addresses[r].data());
    comm.Release();
  });
}

// Abort from outside, while every member but one waits inside a collective.
TEST(InProcessGroup, AbortFromAnotherThread) {
  auto group = MakeInProcessGroup(3);
  std::vector<std::thread> waiting;
  std::atomic<int> threw{0};
  for (const int rank : {0, 2}) {
    waiting.emplace_back([&, rank] {
      try {
        group[static_cast<size_t>(rank)]->Barrier();
      } catch (const Error&) {
        ++threw;
      }
    });
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  group[1]->Abort();
  for (std::thread& thread : waiting) thread.join();
  EXPECT_EQ(threw.load(), 2);
}

TEST(InProcessGroup, MembersGoInAnyOrder) {
  auto group = MakeInProcessGroup(3);
  group[0].reset();
  group[2].reset();
  EXPECT_EQ(group[1]->size(), 3);
  group[1]->Abort();
  EXPECT_THROW(group[1]->Barrier(), Error);
}

}  // namespace
}  // namespace weft
