// Several replicas at once, each with traffic of its own, give what one rank gives.

#include "weft/runner/replicas.h"

#include <gtest/gtest.h>
#include <pthread.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>
#include <thread>

#include "weft/runner/layout_oracle.h"

namespace {

// The thread of this name gets no memory, once.
std::atomic<const char*> out_of_memory = nullptr;

}  // namespace

// Not inlined: the compiler takes a visible pair of new and free for a mistake.
[[gnu::noinline]] void* operator new(size_t size) {
  if (const char* unlucky = out_of_memory.load(std::memory_order_relaxed)) {
    std::array<char, 16> name;
    pthread_getname_np(pthread_self(), name.data(), name.size());
    if (std::strcmp(name.data(), unlucky) == 0 && out_of_memory.exchange(nullptr) != nullptr) throw std::bad_alloc();
  }
  void* memory = std::malloc(size > 0 ? size : 1);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
[[gnu::noinline]] void* operator new(size_t size, const std::nothrow_t&) noexcept {
  return std::malloc(size > 0 ? size : 1);
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace weft {
namespace {

using testing::Choices;
using testing::DriveOptions;
using testing::kBlock;
using testing::Oracle;
using testing::SmallModel;

constexpr SmallModel kDense{.heads = 8, .kv_heads = 2};
constexpr SmallModel kMoe{.heads = 8, .kv_heads = 2, .qk_norm = true, .experts = 7};
constexpr SmallModel kMlaMoe{.heads = 8, .mla = true, .q_lora_rank = 22, .experts = 14, .sigmoid = true};

// The requests of one replica, with a generator of their own: each is driven by its own thread.
struct Traffic {
  Traffic(const SmallModel& model, uint64_t model_seed, uint64_t seed) : rng(seed), oracle(model, model_seed, rng) {}
  void Add(int64_t prompt, int64_t output) {
    oracle.Add(prompt, output);
    tokens += prompt + output;
    ++requests;
  }
  std::mt19937_64 rng;
  Oracle oracle;
  int64_t tokens = 0;
  int64_t requests = 0;
};

class Replicas : public ::testing::TestWithParam<SmallModel> {
 protected:
  // Another replica's traffic; any number of them.
  Traffic& MakeTraffic() { return *traffic_.emplace_back(std::make_unique<Traffic>(GetParam(), seed_, rng_())); }
  std::vector<std::unique_ptr<StepExecutor>> Make(const cp::ParallelConfig& parallel, const Choices& choices = {}) {
    int64_t tokens = 0;
    for (const auto& traffic : traffic_) {
      const int64_t slack = int64_t{parallel.block_tokens} * parallel.KvShards() * traffic->requests;
      tokens = std::max(tokens, traffic->tokens + slack);
    }
    return MakeReplicaExecutors(testing::OptionsOf(parallel, tokens, choices),
                                testing::RandomCheckpoint(testing::SmallConfig(GetParam()), seed_));
  }
  // Replica i has traffic i; those beyond have nothing to do.
  void Check(std::vector<std::unique_ptr<StepExecutor>>& executors, const cp::ParallelConfig& parallel,
             const DriveOptions& options) {
    SCOPED_TRACE(fmt::format("{} replicas of {}", executors.size(), testing::Name(parallel)));
    std::vector<std::thread> threads;
    for (size_t i = 0; i < std::min(executors.size(), traffic_.size()); ++i) {
      threads.emplace_back([&, i] {
        SCOPED_TRACE(fmt::format("replica {}", i));
        traffic_[i]->oracle.Check(*executors[i], parallel, options);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
  void Check(const cp::ParallelConfig& parallel, const DriveOptions& options, const Choices& choices = {}) {
    auto executors = Make(parallel, choices);
    ASSERT_EQ(executors.size(), static_cast<size_t>(parallel.data_parallel));
    Check(executors, parallel, options);
  }
  bool HasExperts() const { return GetParam().experts > 0; }

  uint64_t seed_ = testing::FreshSeed();
  std::mt19937_64 rng_{seed_};
  std::vector<std::unique_ptr<Traffic>> traffic_;
};

TEST_P(Replicas, RandomTrafficOnLayoutsOfUpToEightRanks) {
  // Of different lengths, so that replicas become idle at different times.
  for (const int64_t rounds : {3, 1, 2}) {
    Traffic& traffic = MakeTraffic();
    for (const int64_t n : {1, 19, 90}) traffic.Add(n, 2 * rounds);
  }
  auto one_of = [&](auto... values) { return std::array{values...}[rng_() % sizeof...(values)]; };
  for (const int32_t dp : {2, 3}) {
    auto layouts = testing::LegalLayouts(GetParam(), 8 / dp);
    std::shuffle(layouts.begin(), layouts.end(), rng_);
    layouts.resize(std::min<size_t>(layouts.size(), 12));
    for (cp::ParallelConfig layout : layouts) {
      layout.data_parallel = dp;
      for (const bool ep : {false, true}) {
        if (ep && !HasExperts()) continue;
        layout.expert_parallel = ep;
        const Choices choices{one_of(ContextExchange::kAuto, ContextExchange::kGatherQ, ContextExchange::kGatherKv),
                              one_of(int64_t{1}, int64_t{10}, int64_t{100}),
                              one_of(int64_t{0}, int64_t{8}, int64_t{200}), one_of(false, true),
                              one_of(int64_t{1}, int64_t{7}, int64_t{50}, int64_t{8192})};
        Check(layout, {.max_chunk = 40, .mixed = true, .preempt = 0.05}, choices);
        if (HasFailure()) return;
      }
    }
  }
}

TEST_P(Replicas, FewerTokensThanRanksAndAReplicaThatIsIdleForTheWholeRun) {
  MakeTraffic().Add(1, 6);
  for (const bool stream : {false, true}) {
    for (cp::ParallelConfig layout :
         {cp::ParallelConfig{.data_parallel = 3}, cp::ParallelConfig{.data_parallel = 4, .prefill_context_parallel = 2},
          cp::ParallelConfig{.data_parallel = 2, .tensor_parallel = 4},
          cp::ParallelConfig{.data_parallel = 2,
          .prefill_context_parallel = 2,
          .decode_context_parallel = GetParam().mla ? 2 : 1,
          .tensor_parallel = 2}}) {
      layout.block_tokens = kBlock;
      layout.expert_parallel = HasExperts();
      Check(layout, {}, {.stream = stream});
      if (HasFailure()) return;
    }
  }
}

// A replica that begins late, one whose engine goes early, and one that is used again after a rest.
TEST_P(Replicas, ComeAndGo) {
  for (int i = 0; i < 3; ++i) MakeTraffic().Add(30, 10);
  const cp::ParallelConfig layout{
      .data_parallel = 3, .prefill_context_parallel = 2, .block_tokens = kBlock, .expert_parallel = HasExperts()};
  auto executors = Make(layout);
  Check(executors, layout, {.max_chunk = 11});
  traffic_[2]->oracle.Check(*executors[2], layout, {.mixed = true});
  executors[1].reset();
  std::thread other([&] { traffic_[0]->oracle.Check(*executors[0], layout, {.max_chunk = 5}); });
  traffic_[2]->oracle.Check(*executors[2], layout, {});
  executors[2].reset();
  other.join();
  traffic_[0]->oracle.Check(*executors[0], layout, {});
}

// The tiles of the experts' rows: their number is that of the rank with the most rows, on whatever replica.
TEST_P(Replicas, OneHasMoreRowsThanATileOfExpertsTheOthersHaveOne) {
  if (!HasExperts()) GTEST_SKIP() << "no experts";
  MakeTraffic().Add(1, 6);
  Traffic& large = MakeTraffic();
  for (int i = 0; i < 2; ++i) large.Add(2100, 1);
  Check({.data_parallel = 2, .block_tokens = kBlock, .expert_parallel = true}, {});
}

// A rank of a replica that may have nothing to do itself throws.
TEST_P(Replicas, AFailureEndsThoseThatStepTogether) {
  Traffic& traffic = MakeTraffic();
  traffic.Add(20, 10);
  for (const bool ep : {false, true}) {
    if (ep && !HasExperts()) continue;
    SCOPED_TRACE(ep ? "together" : "alone");
    const cp::ParallelConfig layout{
        .data_parallel = 3, .tensor_parallel = 2, .block_tokens = kBlock, .expert_parallel = ep};
    auto executors = Make(layout);
    std::array<std::string, 3> told;
    for (size_t i = 0; i < 3; ++i) {
      executors[i]->SetFailureListener([&, i](const std::string& why) { told[i] = why; });
    }
    const auto run = [&](size_t replica) { traffic.oracle.Check(*executors[replica], layout, {}); };
    run(0);
    // Of replica 1 where all step together; the last one of whichever steps else.
    out_of_memory = ep ? "weft-rank-2" : "weft-rank-1";
    EXPECT_THROW(run(0), std::exception);
    EXPECT_EQ(out_of_memory, nullptr);
    EXPECT_THROW(run(0), std::exception);
    for (const size_t other : {1, 2}) {
      EXPECT_EQ(told[other].empty(), !ep);
      if (ep) {
        EXPECT_THROW(run(other), std::exception);
      } else {
        run(other);
      }
    }
  }
}

// Every row that a replica's requests had is counted once an expert and layer, wherever the expert is.
TEST_P(Replicas, ExpertLoadCountsEveryRowOnce) {
  const ModelConfig config = testing::SmallConfig(GetParam());
  int64_t rows = 0;  // of all requests, in layers with experts
  for (int i = 0; i < 2; ++i) {
    Traffic& traffic = MakeTraffic();
    for (const int64_t n : {40, 7}) traffic.Add(n, 5);
    rows += (40 + 4 + 7 + 4) * std::ranges::count(config.moe_layers, true);
  }
  const auto load = [&](const cp::ParallelConfig& layout, const Choices& choices) {
    auto executors = Make(layout, choices);
    if (layout.data_parallel > 1) {
      Check(executors, layout, {.max_chunk = 9, .mixed = true});
    } else {
      for (const auto& traffic : traffic_) traffic->oracle.Check(*executors[0], layout, {});
    }
    std::vector<int64_t> sum;
    for (size_t i = 0; i < executors.size(); ++i) {
      const std::vector<int64_t> of_replica = executors[i]->ExpertLoad();
      sum.resize(of_replica.size());
      for (size_t e = 0; e < sum.size(); ++e) sum[e] += of_replica[e];
      // One without requests has its experts run for the others, and else nothing.
      if (HasExperts() && i >= traffic_.size()) {
        EXPECT_EQ(std::ranges::max(of_replica) > 0, layout.expert_parallel);
      }
    }
    return sum;
  };
  const auto one = load({.block_tokens = kBlock}, {});
  if (!HasExperts()) {
    EXPECT_TRUE(one.empty());
    return;
  }
  ASSERT_EQ(one.size(), static_cast<size_t>(config.moe->num_experts));
  EXPECT_EQ(std::accumulate(one.begin(), one.end(), int64_t{0}), rows * config.moe->experts_per_token);
  for (const bool ep : {false, true}) {
    for (const int64_t alone : {0, 100}) {
      const auto got = load({.data_parallel = 3,
                             .prefill_context_parallel = 2,
                             .tensor_parallel = 2,
                             .block_tokens = kBlock,
                             .expert_parallel = ep},
                            {.solo_max_tokens = alone});
      ASSERT_EQ(got.size(), one.size());
      EXPECT_EQ(std::accumulate(got.begin(), got.end(), int64_t{0}), rows * config.moe->experts_per_token);
      // A tie may go the other way.
      for (size_t e = 0; e < one.size(); ++e) EXPECT_NEAR(got[e], one[e], 2) << "expert " << e << ", EP " << ep;
    }
  }
}

TEST_P(Replicas, MemoryIsDividedAmongTheReplicas) {
  cp::ParallelConfig layout{.tensor_parallel = 2, .block_tokens = kBlock};
  ExecutorOptions options = testing::OptionsOf(layout, 0);
  const auto checkpoint = testing::RandomCheckpoint(testing::SmallConfig(GetParam()), seed_);
  options.num_blocks = 0;
  options.kv_cache_bytes = 60 * VirtualBlockBytes(checkpoint->config(), layout, options.kv_dtype);
  EXPECT_EQ(MakeReplicaExecutors(options, checkpoint).at(0)->num_blocks(), 60);
  options.parallel.data_parallel = 3;
  const auto executors = MakeReplicaExecutors(options, checkpoint);
  ASSERT_EQ(executors.size(), 3u);
  for (const auto& executor : executors) EXPECT_EQ(executor->num_blocks(), 20);
  options.kv_cache_bytes = 2 * VirtualBlockBytes(checkpoint->config(), layout, options.kv_dtype);
  EXPECT_THROW(MakeReplicaExecutors(options, checkpoint), Error);
}

INSTANTIATE_TEST_SUITE_P(Models, Replicas, ::testing::Values(kDense, kMoe, kMlaMoe));

}  // namespace
}  // namespace weft
