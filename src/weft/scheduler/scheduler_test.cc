#include "weft/scheduler/scheduler.h"

#include <gtest/gtest.h>

#include <string>

#include "weft/scheduler/fake_ranks_test.h"

namespace weft {
namespace {

using std::chrono::seconds;

EngineRequest Request(int64_t prompt_tokens, int32_t max_tokens, int32_t priority = 0) {
  EngineRequest request;
  for (int64_t i = 0; i < prompt_tokens; ++i) request.prompt_token_ids.push_back(static_cast<int32_t>(i));
  request.params.max_tokens = max_tokens;
  request.priority = priority;
  return request;
}

// A scheduler with ranks that check it. Without prefix cache, of which scheduler_prefix_test.cc is the test.
struct Fixture {
  static SchedulerConfig Uncached(SchedulerConfig config) {
    config.prefix_caching = false;
    return config;
  }
  Fixture(const SchedulerConfig& config, int64_t blocks, const cp::KvLayout& layout = {.block_tokens = 4})
      : scheduler(Uncached(config), layout, blocks),
        ranks({.virtual_block_tokens = layout.VirtualBlockTokens(),
               .num_blocks = blocks,
               .max_num_batched_tokens = config.max_num_batched_tokens,
               .max_num_seqs = config.max_num_seqs,
               .chunked_prefill = config.chunked_prefill,
               .prefix_caching = false}) {}

  RequestHandle Add(EngineRequest request) { return scheduler.Add(std::move(request)).value(); }
  // Plans, runs, and ends what has reached max_tokens; returns the plan.
  StepPlan Step() {
    StepPlan plan = scheduler.Plan();
    rows = scheduler.Update(plan, ranks.Execute(plan));
    EXPECT_EQ(ranks.Problem(), "");
    for (const RowOutput& row : rows) {
      const Scheduler::Request* request = scheduler.Find(row.handle);
      if (request && request->output_tokens() >= request->params.max_tokens) scheduler.Finish(row.handle);
    }
    return plan;
  }

  Scheduler scheduler;
  FakeRanks ranks;
  std::vector<RowOutput> rows;  // of the last step
};

const RequestStep* RowOf(const StepPlan& plan, RequestHandle handle) {
  for (const RequestStep& step : plan.requests) {
    if (step.handle == handle) return &step;
  }
  return nullptr;
}

void ExpectRefused(const SchedulerConfig& config, const std::string& flag, const std::string& rule) {
  try {
    Validate(config);
    ADD_FAILURE() << "accepted; expected " << flag;
  } catch (const Error& error) {
    EXPECT_EQ(error.param(), flag);
    EXPECT_EQ(std::string(error.what()).rfind(flag + " = ", 0), 0u) << error.what();
    EXPECT_NE(std::string(error.what()).find(rule), std::string::npos) << error.what();
  }
}

TEST(SchedulerConfig, RefusalsNameTheFlag) {
  const SchedulerConfig good{.max_model_len = 4096};
  EXPECT_NO_THROW(Validate(good));
  SchedulerConfig c = good;
  c.max_model_len = 1;
  ExpectRefused(c, "--max-model-len", "at least 2");
  c = good;
  c.max_num_seqs = 0;
  ExpectRefused(c, "--max-num-seqs", "at least 1");
  c = good;
  c.max_num_batched_tokens = 255;
  ExpectRefused(c, "--max-num-batched-tokens", "--max-num-seqs = 256");
  c = good;
  c.chunked_prefill = false;
  ExpectRefused(c, "--max-num-batched-tokens", "--max-model-len = 4096");
  c.max_num_batched_tokens = 4096;
  EXPECT_NO_THROW(Validate(c));
}

TEST(Scheduler, RefusesWhatCanNeverBeServed) {
  // 5 blocks of 4 tokens: 20 tokens of KV.
  Scheduler scheduler({.max_model_len = 24, .max_num_batched_tokens = 8, .max_num_seqs = 4}, {.block_tokens = 4}, 5);
  const auto param = [&](EngineRequest request) {
    const auto added = scheduler.Add(std::move(request));
    return added ? std::string("accepted") : added.error().param();
  };
  EXPECT_EQ(param(Request(0, 1)), "prompt");
  EXPECT_EQ(param(Request(4, 0)), "max_tokens");
  EXPECT_EQ(param(Request(24, 1)), "prompt");
  EXPECT_EQ(param(Request(21, 1)), "prompt");
  EXPECT_EQ(param(Request(20, 1)), "accepted");  // the token sampled last needs no KV
  EXPECT_EQ(param(Request(20, 2)), "max_tokens");
  EXPECT_EQ(param(Request(1, 20)), "accepted");
  EXPECT_EQ(param(Request(1, 21)), "max_tokens");
  EXPECT_EQ(param(Request(1, 1000)), "max_tokens");
}

TEST(Scheduler, DecodingGoesOnDuringALongPrompt) {
  Fixture f({.max_model_len = 200, .max_num_batched_tokens = 8, .max_num_seqs = 4}, 100);
  const RequestHandle small = f.Add(Request(3, 50));
  f.Step();
  const RequestHandle large = f.Add(Request(60, 5));
  int chunks = 0;
  while (f.scheduler.Find(large)->output_tokens() == 0) {
    const StepPlan plan = f.Step();
    ASSERT_NE(RowOf(plan, small), nullptr);
    EXPECT_FALSE(RowOf(plan, small)->prefill);
    ASSERT_NE(RowOf(plan, large), nullptr);
    EXPECT_LE(RowOf(plan, large)->tokens, 7);
    EXPECT_TRUE(RowOf(plan, large)->prefill);
    ++chunks;
  }
  EXPECT_EQ(chunks, 9);  // ceil(60 / 7)
}

// A chunk of a prompt may be as short as a decode row, and is a prefill all the same.
TEST(Scheduler, PrefillIsAStateNotALength) {
  Fixture f({.max_model_len = 50, .max_num_batched_tokens = 4, .max_num_seqs = 4}, 100);
  const RequestHandle one = f.Add(Request(1, 3));
  const RequestHandle five = f.Add(Request(4, 3));
  StepPlan plan = f.Step();
  EXPECT_TRUE(RowOf(plan, one)->prefill);
  EXPECT_TRUE(RowOf(plan, one)->sample);
  EXPECT_EQ(RowOf(plan, five)->tokens, 3);
  EXPECT_FALSE(RowOf(plan, five)->sample);
  plan = f.Step();
  EXPECT_FALSE(RowOf(plan, one)->prefill);
  EXPECT_EQ(RowOf(plan, five)->tokens, 1);
  EXPECT_TRUE(RowOf(plan, five)->prefill);
  EXPECT_TRUE(RowOf(plan, five)->sample);
  plan = f.Step();
  EXPECT_FALSE(RowOf(plan, five)->prefill);
}

TEST(Scheduler, WithoutChunksAPromptWaitsForAStepOfItsOwnSize) {
  Fixture f({.max_model_len = 16, .max_num_batched_tokens = 16, .max_num_seqs = 4, .chunked_prefill = false}, 100);
  const RequestHandle a = f.Add(Request(10, 3));
  const RequestHandle b = f.Add(Request(7, 3));
  StepPlan plan = f.Step();
  EXPECT_EQ(RowOf(plan, a)->tokens, 10);
  EXPECT_EQ(RowOf(plan, b), nullptr);
  plan = f.Step();
  EXPECT_EQ(RowOf(plan, a)->tokens, 1);
  EXPECT_EQ(RowOf(plan, b)->tokens, 7);
}

TEST(Scheduler, PriorityThenArrivalAndNobodyOvertakes) {
  Fixture f({.max_model_len = 64, .max_num_batched_tokens = 64, .max_num_seqs = 1}, 16);
  const RequestHandle late = f.Add(Request(4, 1, 1));
  const RequestHandle first = f.Add(Request(4, 1, 0));
  const RequestHandle second = f.Add(Request(4, 1, 0));
  const RequestHandle urgent = f.Add(Request(4, 1, -1));
  for (const RequestHandle handle : {urgent, first, second, late}) {
    const StepPlan plan = f.Step();
    ASSERT_EQ(plan.requests.size(), 1u);
    EXPECT_EQ(plan.requests[0].handle, handle);
  }
  EXPECT_FALSE(f.scheduler.HasRequests());
}

// 6 blocks of 4: two requests of 8 + 8 tokens have to quarrel over them.
TEST(Scheduler, TheLastArrivedIsPreemptedAndComputesAgain) {
  Fixture f({.max_model_len = 64, .max_num_batched_tokens = 64, .max_num_seqs = 4}, 6);
  const RequestHandle a = f.Add(Request(8, 9));
  const RequestHandle b = f.Add(Request(8, 9));
  f.Step();
  f.Step();
  // Both took a third block for their ninth token; with the thirteenth the blocks run out.
  for (int i = 0; i < 3; ++i) f.Step();
  EXPECT_EQ(f.scheduler.Stats().preemptions, 0u);
  const RequestHandle c = f.Add(Request(1, 1));
  StepPlan plan = f.Step();
  EXPECT_EQ(f.scheduler.Stats().preemptions, 1u);
  EXPECT_NE(RowOf(plan, a), nullptr);
  EXPECT_EQ(RowOf(plan, b), nullptr);
  EXPECT_EQ(RowOf(plan, c), nullptr);  // b is in front of it
  const Scheduler::Request* waiting = f.scheduler.Find(b);
  EXPECT_FALSE(waiting->running);
  EXPECT_EQ(waiting->preemptions, 1);
  EXPECT_EQ(waiting->computed, 0);
  EXPECT_EQ(waiting->num_tokens(), 13);  // it keeps its tokens
  while (f.scheduler.Find(a)) f.Step();
  plan = f.Step();
  ASSERT_NE(RowOf(plan, b), nullptr);
  EXPECT_TRUE(plan.released == std::vector<RequestHandle>{a});
  EXPECT_EQ(RowOf(plan, b)->computed, 0);
  EXPECT_EQ(RowOf(plan, b)->tokens, 13);
  EXPECT_EQ(RowOf(plan, b)->first_block, 0);
  EXPECT_TRUE(RowOf(plan, b)->prefill);
  EXPECT_TRUE(RowOf(plan, b)->sample);
  for (const NewRequest& admitted : plan.admitted) EXPECT_EQ(admitted.handle, c);
  while (f.scheduler.HasRequests()) f.Step();
  EXPECT_EQ(f.scheduler.Stats().kv_cache_usage, 0);
}

TEST(Scheduler, BetterPriorityIsNotPreemptedForWorse) {
  Fixture f({.max_model_len = 64, .max_num_batched_tokens = 64, .max_num_seqs = 4}, 6);
  const RequestHandle a = f.Add(Request(8, 9, 1));
  f.Step();
  const RequestHandle b = f.Add(Request(8, 9, 0));
  while (f.scheduler.Stats().preemptions == 0) f.Step();
  EXPECT_FALSE(f.scheduler.Find(a)->running);
  EXPECT_TRUE(f.scheduler.Find(b)->running);
}

TEST(Scheduler, RanksHearOnlyOfRequestsThatRan) {
  Fixture f({.max_model_len = 64, .max_num_batched_tokens = 64, .max_num_seqs = 1}, 16);
  const RequestHandle a = f.Add(Request(4, 9));
  const RequestHandle b = f.Add(Request(4, 9));
  f.Step();
  EXPECT_TRUE(f.scheduler.Finish(b));  // it never ran
  EXPECT_TRUE(f.scheduler.Finish(a));
  EXPECT_FALSE(f.scheduler.Finish(a));
  EXPECT_FALSE(f.scheduler.HasRequests());
  const StepPlan plan = f.Step();
  EXPECT_EQ(plan.released, std::vector<RequestHandle>{a});
  EXPECT_TRUE(plan.requests.empty());
}

TEST(Scheduler, ARequestFinishedDuringItsStepGivesNothing) {
  Fixture f({.max_model_len = 64, .max_num_batched_tokens = 64, .max_num_seqs = 4}, 16);
  const RequestHandle a = f.Add(Request(4, 9));
  const RequestHandle b = f.Add(Request(4, 9));
  const StepPlan plan = f.scheduler.Plan();
  StepOutput output = f.ranks.Execute(plan);
  f.scheduler.Finish(a);
  const std::vector<RowOutput> rows = f.scheduler.Update(plan, std::move(output));
  ASSERT_EQ(rows.size(), 1u);
  EXPECT_EQ(rows[0].handle, b);
  EXPECT_EQ(f.Step().released, std::vector<RequestHandle>{a});
}

TEST(Scheduler, AFailedOrMissingRowEndsThatRequestAlone) {
  Fixture f({.max_model_len = 64, .max_num_batched_tokens = 64, .max_num_seqs = 4}, 16);
  const RequestHandle failed = f.Add(Request(4, 9));
  const RequestHandle silent = f.Add(Request(4, 9));
  const RequestHandle fine = f.Add(Request(4, 9));
  const StepPlan plan = f.scheduler.Plan();
  StepOutput output = f.ranks.Execute(plan);
  ASSERT_EQ(output.rows.size(), 3u);
  output.rows[0].error = "logits are NaN";
  output.rows.erase(output.rows.begin() + 1);
  const std::vector<RowOutput> rows = f.scheduler.Update(plan, std::move(output));
  ASSERT_EQ(rows.size(), 3u);
  EXPECT_EQ(rows[0].error, "logits are NaN");
  EXPECT_EQ(rows[1].handle, fine);
  EXPECT_TRUE(rows[1].token_id.has_value());
  EXPECT_EQ(rows[2].handle, silent);
  EXPECT_TRUE(rows[2].error.has_value());
  EXPECT_EQ(f.scheduler.Find(failed), nullptr);
  EXPECT_EQ(f.scheduler.Find(silent), nullptr);
  EXPECT_NE(f.scheduler.Find(fine), nullptr);
  EXPECT_EQ(f.Step().requests.size(), 1u);
}

TEST(Scheduler, TimesAreThoseOfArrivalAndFirstAdmission) {
  Scheduler scheduler({.max_model_len = 64, .max_num_batched_tokens = 64, .max_num_seqs = 1}, {.block_tokens = 4}, 16);
  const Scheduler::Clock::time_point start{};
  const RequestHandle a = scheduler.Add(Request(4, 9), start + seconds(1)).value();
  const RequestHandle b = scheduler.Add(Request(4, 9), start + seconds(2)).value();
  (void)scheduler.Plan(start + seconds(5));
  EXPECT_EQ(scheduler.Find(a)->arrived, start + seconds(1));
  EXPECT_EQ(scheduler.Find(a)->admitted, start + seconds(5));
  EXPECT_EQ(scheduler.Find(b)->arrived, start + seconds(2));
  EXPECT_EQ(scheduler.Find(b)->admitted, std::nullopt);
}

TEST(SchedulerDeathTest, PlanAndUpdateAlternate) {
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  Scheduler scheduler({.max_model_len = 64, .max_num_batched_tokens = 64, .max_num_seqs = 1}, {.block_tokens = 4}, 16);
  const StepPlan plan = scheduler.Plan();
  EXPECT_DEATH((void)scheduler.Plan(), "not given to Update");
  (void)scheduler.Update(plan, {});
  EXPECT_DEATH((void)scheduler.Update(plan, {}), "planned last");
}

}  // namespace
}  // namespace weft
