// Every layout gives what one rank gives: the logits of every token of every request within 1e-4, the greedy tokens
// alike. The oracle is the same request alone on one rank, its prompt in one step.

#include <gtest/gtest.h>

#include <array>

#include "weft/core/error.h"
#include "weft/runner/layout_oracle.h"

namespace weft {
namespace {

using testing::Choices;
using testing::DriveOptions;
using testing::kBlock;
using testing::kSanitized;
using testing::LegalLayouts;
using testing::MakeExecutor;
using testing::Oracle;
using testing::SmallModel;

class Layouts : public ::testing::TestWithParam<SmallModel> {};

TEST_P(Layouts, AllUpToEightRanksOnMixedChunkedTraffic) {
  const uint64_t seed = testing::FreshSeed();
  std::mt19937_64 rng(seed);
  Oracle oracle(GetParam(), seed, rng);
  for (const int64_t n : {1, 3, 17, 70, 131}) oracle.Add(n, 4);
  const auto layouts = LegalLayouts(GetParam(), 8);
  EXPECT_GT(layouts.size(), 20u);
  auto one_of = [&](auto... values) { return std::array{values...}[rng() % sizeof...(values)]; };
  for (cp::ParallelConfig layout : layouts) {
    if (kSanitized && rng() % 3 != 0) continue;
    const Choices choices{one_of(ContextExchange::kAuto, ContextExchange::kGatherQ, ContextExchange::kGatherKv),
                          one_of(int64_t{1}, int64_t{10}, int64_t{100}), one_of(int64_t{0}, int64_t{8}, int64_t{200}),
                          one_of(false, true), one_of(int64_t{1}, int64_t{7}, int64_t{50}, int64_t{8192})};
    layout.expert_parallel = GetParam().experts > 0 && one_of(false, true);
    oracle.Check(layout, {.max_chunk = 40, .mixed = true, .preempt = 0.05}, choices);
    oracle.Check(layout, {});
    if (HasFatalFailure()) return;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Models, Layouts,
    ::testing::Values(SmallModel{.heads = 8, .kv_heads = 1, .qk_norm = true},
                      SmallModel{.heads = 8, .kv_heads = 2, .bias = true},
                      SmallModel{.heads = 8, .kv_heads = 8, .tied = true},
                      SmallModel{.heads = 6, .kv_heads = 3, .qk_norm = true, .tied = true},
                      SmallModel{.heads = 8, .kv_heads = 2, .qk_norm = true, .experts = 7},
                      SmallModel{.heads = 8, .mla = true, .experts = 7},
                      SmallModel{.heads = 8, .mla = true, .q_lora_rank = 22, .experts = 14, .sigmoid = true}));

// Where context parallelism goes wrong first, case by case, on the layouts that have every kind of group.
class Cases : public ::testing::Test {
 protected:
  uint64_t seed_ = testing::FreshSeed();
  std::mt19937_64 rng_{seed_};
  SmallModel model_{.heads = 8, .kv_heads = 2};
  Oracle oracle_{model_, seed_, rng_};

  static cp::ParallelConfig Layout(int32_t tp, int32_t pcp, int32_t dcp, int32_t interleave = 1) {
    return {.prefill_context_parallel = pcp,
            .decode_context_parallel = dcp,
            .tensor_parallel = tp,
            .kv_interleave = interleave,
            .block_tokens = kBlock};
  }
  static cp::ParallelConfig Replicated(cp::ParallelConfig layout) {
    layout.pcp_kv_layout = cp::PcpKvLayout::kReplicated;
    return layout;
  }
  // In every exchange, with short prompts dealt whole and one rank working for all, and in messages. Under sanitizers
  // one of these three, by chance, for each exchange.
  void CheckAll(const cp::ParallelConfig& layout, const DriveOptions& options) {
    for (const auto exchange : {ContextExchange::kAuto, ContextExchange::kGatherQ, ContextExchange::kGatherKv}) {
      const Choices ways[] = {{.exchange = exchange},
                              {.exchange = exchange, .pcp_min_tokens = 20, .solo_max_tokens = 24},
                              {.exchange = exchange, .stream = true, .segment_tokens = 12}};
      const size_t drawn = rng_() % std::size(ways);
      for (size_t way = 0; way < std::size(ways); ++way) {
        if (!kSanitized || way == drawn) oracle_.Check(layout, options, ways[way]);
      }
      if (HasFatalFailure()) return;
    }
  }
  void CheckAll(const DriveOptions& options) {
    for (const auto& layout :
         {Layout(1, 2, 1), Layout(1, 4, 1, 2), Layout(4, 1, 2), Layout(4, 2, 2, 8), Layout(8, 1, 4, 4),
          Layout(2, 3, 1, 2), Replicated(Layout(2, 3, 1)), Replicated(Layout(4, 2, 2, 4))}) {
      CheckAll(layout, options);
      if (HasFatalFailure()) return;
    }
  }
};

TEST_F(Cases, OneTokenPromptAndPromptsShorterThanTheChunks) {
  for (const int64_t n : {1, 2, 3, 5, 7}) oracle_.Add(n, 6);
  CheckAll({});
}

TEST_F(Cases, PromptsThatTheChunksDoNotDivide) {
  for (const int64_t n : {9, 13, 31, 33, 127}) oracle_.Add(n, 2);
  CheckAll({});
}

TEST_F(Cases, PrefillAndDecodeRowsOfSeveralRequestsInOneStep) {
  for (const int64_t n : {4, 90, 40, 1, 65}) oracle_.Add(n, 12);
  CheckAll({.max_chunk = 24, .mixed = true});
}

TEST_F(Cases, PrefillChunkAsShortAsADecodeRow) {
  for (const int64_t n : {6, 11}) oracle_.Add(n, 3);
  CheckAll({.max_chunk = 1});
  CheckAll({.max_chunk = 2, .mixed = true});
}

TEST_F(Cases, ShardsWithoutTokensAndRanksWithoutQueries) {
  oracle_.Add(1, 3);
  oracle_.Add(2, 2);
  CheckAll(Layout(1, 8, 1, 8), {});
  CheckAll(Layout(8, 1, 4, 8), {});
  CheckAll(Layout(4, 2, 2, 8), {.max_chunk = 1, .mixed = true});
}

TEST_F(Cases, CachedContextBesideNone) {
  oracle_.Add(100, 3);
  oracle_.Add(20, 3);
  CheckAll({.max_chunk = 64, .mixed = true});
  // For certain: a step with the second chunk of one prompt and the first of another, both gathering KV.
  const cp::ParallelConfig one{.block_tokens = kBlock};
  std::vector<int32_t> prompts[2];
  for (auto& prompt : prompts) {
    for (int i = 0; i < 60; ++i) prompt.push_back(static_cast<int32_t>(rng_() % 131));
  }
  const auto alone = MakeExecutor(model_, one, seed_, 512);
  std::vector<std::vector<float>> expected;
  for (const auto& prompt : prompts) {
    expected.push_back(testing::Drive(*alone, one, {{prompt, {0}}}, {}, rng_)[0].logits.at(59));
  }
  for (const auto& layout : {Layout(1, 2, 1), Layout(4, 2, 2, 4), Replicated(Layout(4, 2, 2, 2))}) {
    for (const bool stream : {false, true}) {
      const auto executor = MakeExecutor(
          model_, layout, seed_, 512, {.exchange = ContextExchange::kGatherKv, .stream = stream, .segment_tokens = 12});
      const auto blocks = static_cast<int32_t>(LayoutOf(layout).BlocksFor(60));
      const auto step = [&](int which, int64_t computed, int64_t tokens) {
        RequestStep s;
        s.handle = static_cast<RequestHandle>(which + 1);
        s.computed = computed;
        s.tokens = tokens;
        s.prefill = true;
        s.sample = computed + tokens == 60;
        for (int32_t b = 0; computed == 0 && b < blocks; ++b) s.block_ids.push_back(which * blocks + b);
        if (computed > 0) s.first_block = blocks;
        return s;
      };
      SamplingParams greedy;
      greedy.temperature = 0;
      StepPlan first;
      first.admitted.push_back({1, prompts[0], greedy});
      first.requests = {step(0, 0, 35)};
      executor->Execute(first);
      StepPlan second;
      second.step = 1;
      second.capture_logits = true;
      second.admitted.push_back({2, prompts[1], greedy});
      second.requests = {step(0, 35, 25), step(1, 0, 60)};
      const StepOutput output = executor->Execute(second);
      for (size_t i = 0; i < 2; ++i) {
        const std::vector<float>& logits = output.rows.at(i).logits;
        EXPECT_EQ(output.rows[i].logit_positions.back(), 59);
        EXPECT_LE(testing::RelativeError({logits.end() - 131, logits.end()}, expected[i]), 1e-4)
            << testing::Name(layout) << (stream ? ", streamed" : "") << ", request " << i;
      }
    }
  }
}

TEST_F(Cases, EveryInterleave) {
  oracle_.Add(77, 4);
  for (const int32_t interleave : {1, 2, 4, 8}) {
    CheckAll(Layout(4, 2, 2, interleave), {.max_chunk = 30});
    CheckAll(Layout(1, 3, 1, interleave), {});
  }
}

TEST_F(Cases, LengthsAroundTheEdges) {
  // Of a block (8), of a virtual block of 2, 3 and 4 shards, of an interleave.
  for (const int64_t edge : {2, 8, 16, 24, 32}) {
    for (const int64_t n : {edge - 1, edge, edge + 1}) oracle_.Add(n, 2);
  }
  CheckAll({});
  CheckAll({.max_chunk = 8});
}

TEST_F(Cases, MoreRanksThanKvHeadsWithDcp) {
  oracle_.Add(50, 8);
  CheckAll(Layout(4, 1, 2), {});
  CheckAll(Layout(8, 1, 2, 2), {});
  CheckAll(Layout(8, 1, 4, 8), {.max_chunk = 16});
}

TEST_F(Cases, NothingStaleFromEarlierRequestsInTheSameBlocks) {
  oracle_.Add(60, 4);
  oracle_.Add(7, 4);
  for (const auto& layout : {Layout(1, 2, 1), Layout(4, 2, 2, 4)}) {
    const auto executor = MakeExecutor(model_, layout, seed_, 128);
    for (int round = 0; round < 6; ++round) oracle_.Check(*executor, layout, {.max_chunk = 30, .mixed = true});
  }
}

TEST_F(Cases, PreemptionAndRecomputation) {
  for (const int64_t n : {5, 48, 90}) oracle_.Add(n, 10);
  CheckAll({.max_chunk = 33, .mixed = true, .preempt = 0.25});
}

TEST_F(Cases, ShortPromptsDealtWholeAroundCutOnes) {
  for (const int64_t n : {5, 150, 9, 30, 80, 2}) oracle_.Add(n, 5);
  for (const auto& layout : {Layout(1, 2, 1), Layout(2, 3, 1, 2), Layout(4, 2, 2, 4), Replicated(Layout(1, 3, 1))}) {
    oracle_.Check(layout, {.mixed = true}, {.pcp_min_tokens = 40});
    oracle_.Check(layout, {.max_chunk = 60, .mixed = true}, {.pcp_min_tokens = 1000});
  }
}

TEST_F(Cases, ThousandsOfTokens) {
  oracle_.Add(2300, 3);
  oracle_.Add(1025, 3);
  oracle_.Check(Layout(1, 2, 1), {.max_chunk = 700, .mixed = true});
  oracle_.Check(Layout(4, 2, 2, 4), {.max_chunk = 900});
}

// Verification of speculated tokens: a few rows at once behind a cached context, which each see one key more than the
// one before; those at the edge of a shard, an interleave and a block among them.
TEST_F(Cases, SpeculativeRowsBehindCachedContext) {
  for (const int64_t n : {7, 8, 15, 31, 33, 64}) oracle_.Add(n, 2);
  for (const int64_t rows : {2, 4}) CheckAll({.max_chunk = rows});
}

// Whole experts over all ranks of TP x PCP, with and without shards of the KV cache over PCP.
TEST(ExpertParallel, ExpertsOverTpAndPcp) {
  const uint64_t seed = testing::FreshSeed();
  std::mt19937_64 rng(seed);
  for (const SmallModel& model : {SmallModel{.heads = 8, .kv_heads = 2, .qk_norm = true, .experts = 7},
                                  SmallModel{.heads = 8, .mla = true, .experts = 14, .sigmoid = true}}) {
    Oracle oracle(model, seed, rng);
    for (const int64_t n : {1, 40, 90}) oracle.Add(n, 4);
    for (const auto kv : {cp::PcpKvLayout::kSharded, cp::PcpKvLayout::kReplicated}) {
      for (const auto& [tp, pcp, dcp] : {std::tuple{2, 2, 1}, {1, 3, 1}, {4, 2, 2}}) {
        const cp::ParallelConfig layout{.prefill_context_parallel = pcp,
                                        .decode_context_parallel = dcp,
                                        .tensor_parallel = tp,
                                        .kv_interleave = 2,
                                        .block_tokens = kBlock,
                                        .pcp_kv_layout = kv,
                                        .expert_parallel = true};
        for (const auto exchange : {ContextExchange::kAuto, ContextExchange::kGatherQ, ContextExchange::kGatherKv}) {
          oracle.Check(layout, {.max_chunk = 40, .mixed = true}, {.exchange = exchange, .pcp_min_tokens = 20});
          oracle.Check(layout, {.max_chunk = 40, .mixed = true}, {.exchange = exchange, .stream = true});
          if (::testing::Test::HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST_F(Cases, CountsWhatContextParallelismDid) {
  for (const int64_t n : {5, 150}) oracle_.Add(n, 4);
  constexpr uint64_t kTokens = 5 + 3 + 150 + 3;
  const auto counts = [&](const Choices& choices) {
    const auto executor = MakeExecutor(model_, Layout(1, 2, 1), seed_, 512, choices);
    oracle_.Check(*executor, Layout(1, 2, 1), {});
    return executor->Context();
  };
  ContextCounts c = counts({.exchange = ContextExchange::kGatherKv, .pcp_min_tokens = 20});
  EXPECT_EQ(c.gather_kv_tokens, kTokens);
  EXPECT_EQ(c.gather_q_tokens, 0u);
  EXPECT_EQ(c.cut_prefills, 1u);
  EXPECT_EQ(c.whole_prefills, 1u);
  EXPECT_EQ(c.solo_steps, 0u);
  EXPECT_EQ(c.exchanged_bytes, 0u);  // all is read in place
  c = counts({.exchange = ContextExchange::kGatherQ, .pcp_min_tokens = 20, .solo_max_tokens = 10});
  EXPECT_EQ(c.steps, 4u);
  EXPECT_EQ(c.solo_steps, 3u);  // those of decode rows alone, which one rank of one shard has no exchange for
  EXPECT_EQ(c.gather_q_tokens, 155u);
  EXPECT_EQ(c.gather_kv_tokens, 6u);
  c = counts({.exchange = ContextExchange::kGatherQ, .stream = true});
  EXPECT_EQ(c.gather_q_tokens, kTokens);
  EXPECT_GT(c.exchanged_bytes, kTokens * 16 * 8 * sizeof(float));  // each query once at least
}

TEST(IllegalLayouts, AreRefusedWithFlagValueAndRule) {
  for (const auto& [tp, dcp, flag] :
       {std::tuple{3, 1, "tensor-parallel-size"}, {4, 3, "decode-context-parallel-size"}}) {
    try {
      MakeExecutor({.heads = 8, .kv_heads = 2}, {.decode_context_parallel = dcp, .tensor_parallel = tp}, 1, 100);
      FAIL();
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find(flag), std::string::npos) << e.what();
      EXPECT_NE(std::string(e.what()).find(std::to_string(tp)), std::string::npos) << e.what();
    }
  }
}

}  // namespace
}  // namespace weft
