// The prefix cache as the scheduler uses it.
#include <gtest/gtest.h>

#include <numeric>
#include <random>

#include "weft/scheduler/fake_ranks_test.h"
#include "weft/scheduler/scheduler.h"

namespace weft {
namespace {

using Tokens = std::vector<int32_t>;

Tokens Iota(int32_t first, int32_t n) {
  Tokens tokens(static_cast<size_t>(n));
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

Tokens operator+(Tokens a, const Tokens& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

struct Fixture {
  explicit Fixture(const SchedulerConfig& config, int64_t blocks, const cp::KvLayout& layout = {.block_tokens = 4})
      : scheduler(config, layout, blocks),
        ranks({.virtual_block_tokens = layout.VirtualBlockTokens(),
               .num_blocks = blocks,
               .max_num_batched_tokens = config.max_num_batched_tokens,
               .max_num_seqs = config.max_num_seqs,
               .chunked_prefill = config.chunked_prefill,
               .prefix_caching = config.prefix_caching}) {}

  RequestHandle Add(Tokens prompt, int32_t max_tokens, const std::string& salt = "", bool logprobs = false) {
    EngineRequest request;
    request.prompt_token_ids = std::move(prompt);
    request.params.max_tokens = max_tokens;
    request.cache_salt = salt;
    if (logprobs) request.params.prompt_logprobs = 0;
    const RequestHandle handle = scheduler.Add(std::move(request)).value();
    ranks.SetSalt(handle, salt);
    return handle;
  }
  StepPlan Step() {
    StepPlan plan = scheduler.Plan();
    const auto rows = scheduler.Update(plan, ranks.Execute(plan));
    EXPECT_EQ(ranks.Problem(), "");
    for (const RowOutput& row : rows) {
      const Scheduler::Request* request = scheduler.Find(row.handle);
      if (request && request->output_tokens() >= request->params.max_tokens) {
        last = request->tokens;
        scheduler.Finish(row.handle);
      }
    }
    return plan;
  }
  void Drain() {
    while (scheduler.HasRequests()) Step();
  }

  Scheduler scheduler;
  FakeRanks ranks;
  Tokens last;  // of the request that ended last
};

const SchedulerConfig kConfig{.max_model_len = 200, .max_num_batched_tokens = 64, .max_num_seqs = 4};

TEST(SchedulerPrefixCache, FullBlocksAreSharedAndTheRestIsCopied) {
  Fixture f(kConfig, 20);
  f.Add(Iota(0, 11), 1);
  f.Drain();
  // 8 tokens in two shared blocks, 2 copied, then other tokens.
  const RequestHandle b = f.Add(Iota(0, 10) + Iota(50, 5), 3);
  const StepPlan plan = f.Step();
  ASSERT_EQ(plan.requests.size(), 1u);
  EXPECT_EQ(plan.requests[0].computed, 10);
  EXPECT_EQ(plan.requests[0].tokens, 5);
  ASSERT_EQ(plan.requests[0].copies.size(), 1u);
  EXPECT_EQ(plan.requests[0].copies[0].tokens, 2);
  EXPECT_EQ(plan.requests[0].copies[0].destination, plan.requests[0].block_ids[2]);
  EXPECT_EQ(f.scheduler.Find(b)->cached_tokens, 10);
  const SchedulerStats stats = f.scheduler.Stats();
  EXPECT_EQ(stats.prefix_cache_queries, 26u);
  EXPECT_EQ(stats.prefix_cache_hits, 10u);
  EXPECT_TRUE(f.Step().requests[0].copies.empty());  // once
  f.Drain();
}

TEST(SchedulerPrefixCache, TheLastTokenOfAPromptIsAlwaysComputed) {
  for (const int32_t n : {1, 4, 8, 9}) {
    Fixture f(kConfig, 20);
    f.Add(Iota(0, n), 1);
    f.Drain();
    f.Add(Iota(0, n), 1);
    const StepPlan plan = f.Step();
    EXPECT_EQ(plan.requests[0].computed, n - 1);
    EXPECT_EQ(plan.requests[0].tokens, 1);
    EXPECT_TRUE(plan.requests[0].prefill);
    EXPECT_TRUE(plan.requests[0].sample);
  }
}

// On 8 shards a virtual block is longer than both prompts.
TEST(SchedulerPrefixCache, PrefixesShorterThanAVirtualBlockAreFound) {
  Fixture f(kConfig, 4, {.block_tokens = 16, .interleave = 4, .shards = 8});
  f.Add(Iota(0, 50), 1);
  f.Drain();
  f.Add(Iota(0, 40) + Iota(100, 9), 1);
  EXPECT_EQ(f.Step().requests[0].computed, 40);
}

TEST(SchedulerPrefixCache, OutputIsFoundByTheNextTurn) {
  Fixture f(kConfig, 20);
  f.Add(Iota(0, 6), 9);
  f.Drain();
  ASSERT_EQ(f.last.size(), 15u);
  f.Add(f.last + Iota(70, 4), 1);
  EXPECT_EQ(f.Step().requests[0].computed, 14);  // the newest token was never run
}

// The second request comes while the first one still works on its prompt.
TEST(SchedulerPrefixCache, ARunningRequestsBlocksAreFound) {
  SchedulerConfig config = kConfig;
  config.max_num_batched_tokens = 7;
  Fixture f(config, 20);
  f.Add(Iota(0, 20), 5);
  f.Step();
  f.Step();  // 14 computed
  f.Add(Iota(0, 30), 1);
  const StepPlan plan = f.Step();
  ASSERT_EQ(plan.requests.size(), 2u);
  EXPECT_EQ(plan.requests[1].computed, 14);
  EXPECT_EQ(plan.requests[1].tokens, 1);
  f.Drain();
}

TEST(SchedulerPrefixCache, OnlyTheSameSaltShares) {
  Fixture f(kConfig, 40);
  f.Add(Iota(0, 12), 1, "a");
  f.Drain();
  f.Add(Iota(0, 12), 1);
  EXPECT_EQ(f.Step().requests[0].computed, 0);
  f.Add(Iota(0, 12), 1, "b");
  EXPECT_EQ(f.Step().requests[0].computed, 0);
  f.Add(Iota(0, 12), 1, "a");
  EXPECT_EQ(f.Step().requests[0].computed, 11);
}

TEST(SchedulerPrefixCache, PromptLogprobsAreComputedAndFoundByOthers) {
  Fixture f(kConfig, 40);
  f.Add(Iota(0, 12), 1);
  f.Drain();
  f.Add(Iota(0, 14), 1, "", true);
  EXPECT_EQ(f.Step().requests[0].computed, 0);
  EXPECT_EQ(f.scheduler.Stats().prefix_cache_queries, 12u);  // as in vLLM it does not count
  f.Add(Iota(0, 16), 1);
  EXPECT_EQ(f.Step().requests[0].computed, 14);
}

TEST(SchedulerPrefixCache, APreemptedRequestFindsItsOwnBlocks) {
  Fixture f({.max_model_len = 64, .max_num_batched_tokens = 64, .max_num_seqs = 4}, 6);
  const RequestHandle a = f.Add(Iota(0, 8), 9);
  const RequestHandle b = f.Add(Iota(50, 8), 9);
  while (f.scheduler.Stats().preemptions == 0) f.Step();
  EXPECT_EQ(f.scheduler.Find(b)->computed, 0);
  while (f.scheduler.Find(a)) f.Step();
  const StepPlan plan = f.Step();
  ASSERT_EQ(plan.requests.size(), 1u);
  EXPECT_EQ(plan.requests[0].handle, b);
  // One of its three blocks went to the other one, the last one first.
  EXPECT_EQ(plan.requests[0].computed, 8);
  EXPECT_EQ(f.scheduler.Find(b)->cached_tokens, 0);  // its client's prompt was not found
  f.Drain();
}

TEST(SchedulerPrefixCache, TheSourceOfACopyStaysUntilTheStepHasRun) {
  // 3 blocks: the source, unused since, and two free ones, wanted by two requests.
  Fixture f(kConfig, 3);
  f.Add(Iota(0, 3), 1);
  f.Drain();
  const RequestHandle b = f.Add(Iota(0, 2) + Iota(20, 1), 2);
  f.Add(Iota(30, 8), 1);
  const StepPlan plan = f.scheduler.Plan();
  ASSERT_EQ(plan.requests.size(), 1u);  // no room for the other one in this step
  ASSERT_EQ(plan.requests[0].copies.size(), 1u);
  EXPECT_DOUBLE_EQ(f.scheduler.Stats().kv_cache_usage, 2.0 / 3);
  StepOutput output = f.ranks.Execute(plan);
  EXPECT_EQ(f.ranks.Problem(), "");
  f.scheduler.Finish(b);  // aborted meanwhile
  EXPECT_DOUBLE_EQ(f.scheduler.Stats().kv_cache_usage, 1.0 / 3);
  (void)f.scheduler.Update(plan, std::move(output));
  EXPECT_EQ(f.scheduler.Stats().kv_cache_usage, 0);
  EXPECT_EQ(f.Step().requests.size(), 1u);
}

TEST(SchedulerPrefixCache, NothingOfAFailedRequestIsUsed) {
  Fixture f(kConfig, 20);
  f.Add(Iota(0, 8), 1);
  f.Drain();
  f.Add(Iota(0, 12), 5);
  const StepPlan plan = f.scheduler.Plan();
  StepOutput output = f.ranks.Execute(plan);
  output.rows[0].error = "not a number";
  (void)f.scheduler.Update(plan, std::move(output));
  EXPECT_FALSE(f.scheduler.HasRequests());
  f.Add(Iota(0, 14), 1);
  EXPECT_EQ(f.Step().requests[0].computed, 8);
}

TEST(SchedulerPrefixCache, AHitMakesRoomInABudgetWithoutChunks) {
  Fixture f({.max_model_len = 16, .max_num_batched_tokens = 16, .max_num_seqs = 4, .chunked_prefill = false}, 20);
  f.Add(Iota(0, 12), 1);
  f.Drain();
  f.Add(Iota(50, 12), 1);
  f.Add(Iota(0, 14), 1);
  const StepPlan plan = f.Step();
  ASSERT_EQ(plan.requests.size(), 2u);
  EXPECT_EQ(plan.requests[1].computed, 12);
}

TEST(SchedulerPrefixCache, OffFindsNothing) {
  SchedulerConfig config = kConfig;
  config.prefix_caching = false;
  Fixture f(config, 20);
  f.Add(Iota(0, 12), 1);
  f.Drain();
  f.Add(Iota(0, 12), 1);
  EXPECT_EQ(f.Step().requests[0].computed, 0);
  EXPECT_EQ(f.scheduler.Stats().prefix_cache_queries, 0u);
}

TEST(SchedulerForesee, TellsOfPrefixBacklogAndRoomAndChangesNothing) {
  Fixture f(kConfig, 20);
  const auto foresee = [&](Tokens prompt, const std::string& salt = "", bool logprobs = false) {
    EngineRequest request;
    request.prompt_token_ids = std::move(prompt);
    request.cache_salt = salt;
    if (logprobs) request.params.prompt_logprobs = 0;
    return f.scheduler.Foresee(request);
  };
  EXPECT_EQ(foresee(Iota(0, 10)).cached_tokens, 0);
  f.Add(Iota(0, 11), 1);
  EXPECT_EQ(foresee(Iota(0, 10)).tokens_ahead, 11);
  EXPECT_EQ(foresee(Iota(0, 10)).requests, 1);
  f.Drain();
  EXPECT_EQ(foresee(Iota(0, 10)).tokens_ahead, 0);
  EXPECT_EQ(foresee(Iota(0, 10)).cached_tokens, 9);
  EXPECT_EQ(foresee(Iota(0, 10) + Iota(50, 9)).cached_tokens, 10);
  EXPECT_EQ(foresee(Iota(0, 10), "salt").cached_tokens, 0);
  EXPECT_EQ(foresee(Iota(0, 10), "", true).cached_tokens, 0);
  // What is looked at stays as old as it was: the first prompt's blocks go before the second's.
  f.Add(Iota(100, 30), 1);
  f.Drain();
  for (int i = 0; i < 10; ++i) EXPECT_EQ(foresee(Iota(0, 12)).cached_tokens, 11);
  f.Add(Iota(200, 44), 1);
  f.Drain();
  EXPECT_LT(foresee(Iota(0, 12)).cached_tokens, 11);
  EXPECT_GE(foresee(Iota(100, 30)).cached_tokens, 28);

  // Places and blocks.
  EXPECT_FALSE(foresee(Iota(300, 80)).must_wait);
  EXPECT_TRUE(foresee(Iota(300, 81)).must_wait);
  f.Add(Iota(400, 40), 1);
  EXPECT_FALSE(foresee(Iota(300, 40)).must_wait);
  EXPECT_TRUE(foresee(Iota(300, 41)).must_wait);
  for (int i = 0; i < 3; ++i) f.Add(Iota(500 + i, 1), 1);
  EXPECT_TRUE(foresee(Iota(300, 1)).must_wait);
  f.Drain();
  EXPECT_FALSE(foresee(Iota(300, 1)).must_wait);
}

// Through prefix hits, preemptions, and requests that end anywhere.
TEST(SchedulerForesee, TokensAheadAreThoseNotComputed) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937_64 rng(seed);
  SchedulerConfig config = kConfig;
  config.max_num_batched_tokens = 16;
  Fixture f(config, 14);
  std::vector<RequestHandle> handles;
  uint64_t preemptions = 0;
  for (int step = 0; step < 400; ++step) {
    if (rng() % 3 == 0) {
      handles.push_back(f.Add(Iota(static_cast<int32_t>(rng() % 3) * 100, 1 + static_cast<int32_t>(rng() % 20)), 20));
    }
    if (rng() % 8 == 0 && !handles.empty()) f.scheduler.Finish(handles[rng() % handles.size()]);
    if (f.scheduler.HasRequests()) f.Step();
    int64_t ahead = 0;
    for (const RequestHandle handle : handles) {
      if (const auto* request = f.scheduler.Find(handle)) ahead += request->num_tokens() - request->computed;
    }
    ASSERT_EQ(f.scheduler.Foresee({}).tokens_ahead, ahead) << "step " << step;
    preemptions = f.scheduler.Stats().preemptions;
  }
  EXPECT_GT(preemptions, 0u);
}

}  // namespace
}  // namespace weft
