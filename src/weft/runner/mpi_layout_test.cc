// Ranks in several processes give what one rank gives. Run by mpirun: process 0 drives the requests and compares, the
// others follow; every process runs all tests, in the same order, and draws the same layouts.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <optional>
#include <thread>

#include "weft/parallel/mpi_test_main.h"
#include "weft/runner/layout_oracle.h"
#include "weft/runner/mpi_executor.h"

namespace weft {
namespace {

using testing::Choices;
using testing::DriveOptions;
using testing::everybody;
using testing::Oracle;
using testing::SmallModel;

// More than any of the tests uses.
constexpr int64_t kTokens = 4096;

uint64_t CommonSeed() { return testing::CommonSeed(everybody->rank() == 0 ? testing::FreshSeed() : 0); }

// Runs `drive` in process 0 on ranks of all processes.
void OnAll(const SmallModel& model, const cp::ParallelConfig& layout, const Choices& choices, uint64_t seed,
           const std::function<void(std::span<const std::unique_ptr<StepExecutor>>)>& drive) {
  ExecutorOptions options = testing::OptionsOf(layout, kTokens, choices);
  options.step_timeout_s = 60;
  const auto checkpoint = testing::RandomCheckpoint(testing::SmallConfig(model), seed);
  const auto processes = Processes::Join();
  if (everybody->rank() == 0) {
    drive(MakeMpiExecutors(options, checkpoint, processes));
  } else {
    FollowSteps(options, checkpoint, processes);
  }
}

class MpiLayouts : public ::testing::TestWithParam<SmallModel> {};

TEST_P(MpiLayouts, GiveWhatOneRankGives) {
  const uint64_t seed = CommonSeed();
  std::mt19937_64 rng(seed);      // the same everywhere
  std::mt19937_64 traffic(seed);  // process 0's own
  std::optional<Oracle> oracle;
  if (everybody->rank() == 0) {
    oracle.emplace(GetParam(), seed, traffic);
    for (const int64_t n : {1, 3, 17, 70, 131}) oracle->Add(n, 4);
  }
  auto one_of = [&](auto... values) { return std::array{values...}[rng() % sizeof...(values)]; };
  int tried = 0;
  for (cp::ParallelConfig layout : testing::LegalLayouts(GetParam(), 8)) {
    // Pairs of processes, one rank each or several.
    if (layout.WorldSize() % everybody->size() != 0) continue;
    if (testing::kSanitized && rng() % 3 != 0) continue;
    const Choices choices{one_of(ContextExchange::kAuto, ContextExchange::kGatherQ, ContextExchange::kGatherKv),
                          one_of(int64_t{1}, int64_t{10}, int64_t{100}), one_of(int64_t{0}, int64_t{8}, int64_t{200}),
                          one_of(false, true), one_of(int64_t{1}, int64_t{7}, int64_t{50}, int64_t{8192})};
    layout.expert_parallel = GetParam().experts > 0 && one_of(false, true);
    OnAll(GetParam(), layout, choices, seed, [&](std::span<const std::unique_ptr<StepExecutor>> replicas) {
      StepExecutor& executor = *replicas[0];
      SCOPED_TRACE(fmt::format("exchange {}, cut from {}, segments of {}", static_cast<int>(choices.exchange),
                               choices.pcp_min_tokens, choices.segment_tokens));
      oracle->Check(executor, layout, {.max_chunk = 40, .mixed = true, .preempt = 0.05});
      if (!HasFatalFailure()) oracle->Check(executor, layout, {});
    });
    ++tried;
    // All go on, or none does.
    if (testing::AnyProcess(HasFailure())) return;
  }
  EXPECT_GT(tried, testing::kSanitized ? 0 : 8);
}

// Replicas, each with traffic of its own from its own thread, the last one with none.
TEST_P(MpiLayouts, ReplicasGiveWhatOneRankGives) {
  const uint64_t seed = CommonSeed();
  std::mt19937_64 rng(seed);
  std::array<std::mt19937_64, 2> traffic;
  std::vector<std::unique_ptr<Oracle>> oracles;
  if (everybody->rank() == 0) {
    for (size_t i = 0; i < traffic.size(); ++i) {
      traffic[i].seed(seed + i);
      oracles.push_back(std::make_unique<Oracle>(GetParam(), seed, traffic[i]));
      for (const int64_t n : {1, 23, 90}) oracles.back()->Add(n, 2 + 4 * static_cast<int64_t>(i));
    }
  }
  const bool moe = GetParam().experts > 0;
  for (cp::ParallelConfig layout :
       {cp::ParallelConfig{.data_parallel = 4}, cp::ParallelConfig{.data_parallel = 2, .prefill_context_parallel = 2},
        cp::ParallelConfig{.data_parallel = 3, .prefill_context_parallel = 4},
        cp::ParallelConfig{.data_parallel = 2, .tensor_parallel = 4},
        // Replicas that begin in the middle of a process: of the second one's groups some are within it, some not.
        cp::ParallelConfig{.data_parallel = 3,
        .prefill_context_parallel = 2,
        .decode_context_parallel = 2,
        .tensor_parallel = 2,
        .pcp_kv_layout = cp::PcpKvLayout::kReplicated}}) {
    layout.block_tokens = testing::kBlock;
    const ModelConfig shape = testing::SmallConfig(GetParam());
    if (layout.decode_context_parallel > 1 && !shape.mla && shape.num_kv_heads > 1) continue;
    if (layout.WorldSize() % everybody->size() != 0) continue;
    for (const bool ep : {false, true}) {
      if (ep && !moe) continue;
      layout.expert_parallel = ep;
      OnAll(GetParam(), layout, {}, seed, [&](std::span<const std::unique_ptr<StepExecutor>> replicas) {
        ASSERT_EQ(replicas.size(), static_cast<size_t>(layout.data_parallel));
        std::vector<std::thread> threads;
        for (size_t i = 0; i < oracles.size(); ++i) {
          threads.emplace_back([&, i] { oracles[i]->Check(*replicas[i], layout, {.max_chunk = 40, .mixed = true}); });
        }
        for (std::thread& thread : threads) thread.join();
        // Each token once for each of its experts and layers with experts, in whatever process.
        const ModelConfig config = testing::SmallConfig(GetParam());
        int64_t rows = 0;
        for (const int64_t outputs : {2, 6}) rows += 1 + 23 + 90 + 3 * (outputs - 1);
        int64_t load = 0;
        for (const auto& replica : replicas) {
          for (const int64_t n : replica->ExpertLoad()) load += n;
        }
        const int64_t layers = std::ranges::count(config.moe_layers, true);
        EXPECT_EQ(load, moe ? rows * layers * config.moe->experts_per_token : 0);
      });
      if (testing::AnyProcess(HasFailure())) return;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Models, MpiLayouts,
                         ::testing::Values(SmallModel{.heads = 8, .kv_heads = 2, .qk_norm = true},
                                           SmallModel{.heads = 8, .kv_heads = 8, .tied = true},
                                           SmallModel{.heads = 8, .mla = true, .experts = 7}));

TEST(MpiExecutor, ProcessesThatDoNotDivideTheRanksAreRefusedEverywhere) {
  const cp::ParallelConfig layout{.tensor_parallel = 1};
  try {
    OnAll({}, layout, {}, 1, [](auto) {});
    ADD_FAILURE() << "taken";
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("must divide the number of ranks, 1"), std::string::npos) << e.what();
  }
}

TEST(MpiExecutor, DifferentOptionsAreRefusedEverywhere) {
  Choices choices;
  if (everybody->rank() == everybody->size() - 1) choices.segment_tokens = 77;
  try {
    OnAll({}, {.prefill_context_parallel = everybody->size()}, choices, 1, [](auto) {});
    ADD_FAILURE() << "taken";
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("was started with other options"), std::string::npos) << e.what();
    EXPECT_NE(std::string(e.what()).find("segment 77"), std::string::npos) << e.what();
  }
}

// A failure in one process ends the steps of all, with its reason.
TEST(MpiExecutor, TheReasonOfAFailureReachesProcessZero) {
  const cp::ParallelConfig layout{.prefill_context_parallel = everybody->size(), .block_tokens = testing::kBlock};
  const auto checkpoint = testing::RandomCheckpoint(testing::SmallConfig({}), 1);
  const ExecutorOptions options = testing::OptionsOf(layout, kTokens);
  const auto processes = Processes::Join();
  std::string said;
  try {
    if (everybody->rank() == 0) {
      const auto executors = MakeMpiExecutors(options, checkpoint, processes);
      while (true) executors[0]->Execute({});  // up to the failure
    }
    if (everybody->rank() > 1) FollowSteps(options, checkpoint, processes);
    std::jthread breaking([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(200));
      processes->Fail("process 1: out of luck");
    });
    FollowSteps(options, checkpoint, processes);
  } catch (const Error& e) {
    said = e.what();
  }
  EXPECT_EQ(said, "process 1: out of luck");
}

}  // namespace
}  // namespace weft

int main(int argc, char** argv) { return weft::testing::MpiTestMain(argc, argv); }
