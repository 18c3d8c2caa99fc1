#include "weft/cli/layout_report.h"

#include <gtest/gtest.h>

#include <random>

#include "weft/cli/commands.h"
#include "weft/core/error.h"

namespace weft::cli {
namespace {

LayoutQuery Query(int32_t tp, int32_t pcp, int32_t dcp, int32_t interleave, int32_t block, int64_t prompt) {
  LayoutQuery query;
  query.parallel = {.prefill_context_parallel = pcp,
                    .decode_context_parallel = dcp,
                    .tensor_parallel = tp,
                    .kv_interleave = interleave,
                    .block_tokens = block};
  query.heads = {.heads = tp * 2, .kv_heads = tp / dcp};
  query.prompt_tokens = prompt;
  return query;
}

// The example of docs/context_parallel.md.
TEST(LayoutReport, TokensHeadsAndBytesOfEachRank) {
  LayoutQuery query = Query(4, 2, 2, 1, 8, 21);
  query.kv_token_bytes = 100;
  const LayoutReport report = MakeLayoutReport(query);
  EXPECT_EQ(report.layout.VirtualBlockTokens(), 32);
  EXPECT_EQ(report.blocks, 1);
  ASSERT_EQ(report.ranks.size(), 8u);
  const LayoutReport::Rank& rank5 = report.ranks[5];  // pcp 1, tp 1
  EXPECT_EQ(rank5.coord.kv_shard, 3);
  EXPECT_EQ(rank5.heads.first, 2);
  EXPECT_EQ(rank5.heads.count, 2);
  EXPECT_EQ(rank5.kv_heads.first, 0);
  EXPECT_EQ(report.ranks[6].kv_heads.first, 1);
  EXPECT_EQ(report.ranks[6].kv_heads.count, 1);
  EXPECT_EQ(rank5.tokens, 5);            // 3, 7, 11, 15, 19
  EXPECT_EQ(report.ranks[0].tokens, 6);  // 0, 4, .. 20
  EXPECT_EQ(rank5.kv_bytes, 500);
  EXPECT_EQ(rank5.allocated_kv_bytes, 800);
  EXPECT_EQ(report.shards[3].first, 3);
  EXPECT_EQ(report.shards[3].last, 19);
}

TEST(LayoutReport, ManyKvHeadsOnARank) {
  LayoutQuery query = Query(2, 1, 1, 1, 16, 5);
  query.heads = {.heads = 8, .kv_heads = 4};
  const LayoutReport report = MakeLayoutReport(query);
  EXPECT_EQ(report.ranks[1].heads.first, 4);
  EXPECT_EQ(report.ranks[1].heads.count, 4);
  EXPECT_EQ(report.ranks[1].kv_heads.first, 2);
  EXPECT_EQ(report.ranks[1].kv_heads.count, 2);
  // A latent is held by everybody.
  query.heads = {.heads = 8, .kv_heads = 1, .mla = true};
  EXPECT_EQ(MakeLayoutReport(query).ranks[1].kv_heads.first, 0);
}

// Against the definitions, one token at a time.
TEST(LayoutReport, EveryTokenIsStoredOnceAndComputedOnce) {
  const uint64_t seed = std::random_device{}();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::mt19937_64 rng(seed);
  for (int round = 0; round < 200; ++round) {
    const auto below = [&](int64_t n) { return static_cast<int64_t>(rng() % static_cast<uint64_t>(n)); };
    const auto dcp = static_cast<int32_t>(1 + below(3));
    LayoutQuery query = Query(dcp * static_cast<int32_t>(1 + below(3)), static_cast<int32_t>(1 + below(4)), dcp,
                              static_cast<int32_t>(1 << below(3)), 8, 1 + below(400));
    if (below(2) == 0) query.parallel.pcp_kv_layout = cp::PcpKvLayout::kReplicated;
    query.cached_tokens = below(query.prompt_tokens);
    query.tokens_per_step = 1 + below(300);
    query.costs = {.per_token = 10, .per_pair = 0.1, .min_tokens_to_cut = 1 + below(100)};
    const LayoutReport report = MakeLayoutReport(query);
    int64_t stored = 0;
    for (const auto& shard : report.shards) stored += shard.tokens;
    EXPECT_EQ(stored, query.prompt_tokens);
    std::vector<int> computed(static_cast<size_t>(query.prompt_tokens));
    for (const auto& step : report.steps) {
      double work = 0;
      for (const auto& part : step.parts) {
        int64_t tokens = 0;
        for (const cp::Chunk& chunk : part.chunks) {
          tokens += chunk.tokens;
          for (int64_t x = chunk.first; x < chunk.first + chunk.tokens; ++x) ++computed[static_cast<size_t>(x)];
        }
        EXPECT_EQ(tokens, part.tokens);
        work += part.work;
      }
      EXPECT_NEAR(work, 1, 1e-9);
    }
    for (int64_t x = 0; x < query.prompt_tokens; ++x) {
      EXPECT_EQ(computed[static_cast<size_t>(x)], x >= query.cached_tokens ? 1 : 0) << x;
    }
    EXPECT_GE(report.critical_share, 1.0 / query.parallel.prefill_context_parallel - 1e-9);
    EXPECT_LE(report.critical_share, 1 + 1e-9);
    // The text has a line of the map for it; the JSON the same numbers.
    const std::string text = TextOf(report);
    EXPECT_EQ(text.find('?'), std::string::npos) << text;
    const nlohmann::json json = JsonOf(report);
    EXPECT_EQ(json["ranks"].size(), static_cast<size_t>(query.parallel.WorldSize()));
    EXPECT_EQ(json["steps"].size(), report.steps.size());
  }
}

TEST(LayoutReport, TextDrawsTheMaps) {
  LayoutQuery query = Query(1, 2, 1, 2, 4, 12);
  const std::string text = TextOf(MakeLayoutReport(query));
  for (const char* part :
       {"ranks             2 = PCP 2 x TP 1", "virtual block     8 tokens on all shards; the prompt takes 2",
        "shard 0: 6 tokens: 0-1, 4-5, 8-9", "shard 1: 6 tokens: 2-3, 6-7, 10-11", "        0 |010101|",
        "PCP rank 0: 0-2 and 9-11 (6 tokens, 50.0 % of the work)", "PCP rank 1: 3-8 (6 tokens, 50.0 % of the work)",
        "        0 |000111111000|"}) {
    EXPECT_NE(text.find(part), std::string::npos) << part << " is not in\n" << text;
  }
}

TEST(LayoutReport, JsonSaysTheSame) {
  LayoutQuery query = Query(1, 2, 1, 2, 4, 12);
  query.cached_tokens = 4;
  const nlohmann::json json = JsonOf(MakeLayoutReport(query));
  EXPECT_EQ(json["kv_shards"], 2);
  EXPECT_EQ(json["shards"][1],
            nlohmann::json::parse(R"({"shard": 1, "tokens": 6, "first": 2, "last": 11, "run": 2, "stride": 4})"));
  EXPECT_EQ(json["steps"][0]["pcp_ranks"][0]["chunks"], nlohmann::json::parse("[[4, 6], [10, 12]]"));
  EXPECT_EQ(json["steps"][0]["pcp_ranks"][1]["chunks"], nlohmann::json::parse("[[6, 10]]"));
  EXPECT_FALSE(json["ranks"][0].contains("kv_bytes"));
}

TEST(LayoutReport, WhatDoesNotGoTogetherIsRefused) {
  LayoutQuery query = Query(4, 1, 2, 1, 8, 10);
  query.cached_tokens = 10;
  EXPECT_THROW(MakeLayoutReport(query), Error);
  query.cached_tokens = 0;
  query.heads.kv_heads = 4;
  EXPECT_THROW(MakeLayoutReport(query), Error);
}

TEST(InspectLayout, WithoutAModel) {
  testing::internal::CaptureStdout();
  EXPECT_EQ(Main({"inspect", "layout", "-tp", "4", "-dcp", "2", "-pcp", "2", "--block-size", "16", "--prompt-tokens",
                  "100", "--json"}),
            0);
  const nlohmann::json json = nlohmann::json::parse(testing::internal::GetCapturedStdout());
  EXPECT_EQ(json["ranks"].size(), 8u);
  EXPECT_EQ(json["kv_shards"], 4);
  EXPECT_EQ(json["ranks"][7]["kv_heads"], nlohmann::json::parse("[1, 2]"));
  testing::internal::CaptureStderr();
  EXPECT_EQ(Main({"inspect", "layout", "-tp", "4", "-dcp", "3"}), 1);
  EXPECT_NE(testing::internal::GetCapturedStderr().find("--decode-context-parallel-size = 3"), std::string::npos);
}

}  // namespace
}  // namespace weft::cli
