// Every vector of tests/data/cp: made by simulation, token by token, outside of this code base.
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "weft/cp/layout.h"
#include "weft/cp/transfer.h"

namespace weft::cp {
namespace {

using nlohmann::json;

const json& Vectors() {
  static const json vectors = [] {
    std::ifstream file(std::string(WEFT_TEST_DATA) + "/cp/cp_vectors.json");
    return json::parse(file);
  }();
  return vectors;
}

TEST(CpVectors, Layout) {
  ASSERT_GE(Vectors()["layout"].size(), 60u);
  for (const json& c : Vectors()["layout"]) {
    SCOPED_TRACE(c.dump());
    const KvLayout layout{.block_tokens = c["block"], .interleave = c["interleave"], .shards = c["shards"]};
    const int64_t length = c["length"];
    for (int64_t x = 0; x < length; ++x) {
      const auto i = static_cast<size_t>(x);
      EXPECT_EQ(layout.Owner(x), c["owner"][i].get<int32_t>());
      EXPECT_EQ(layout.VirtualBlock(x), c["virtual_block"][i].get<int64_t>());
      EXPECT_EQ(layout.Offset(x), c["offset"][i].get<int32_t>());
    }
    for (int32_t r = 0; r < layout.shards; ++r) {
      EXPECT_EQ(layout.LocalLen(length, r), c["local_len"][static_cast<size_t>(r)].get<int64_t>());
    }
  }
}

TEST(CpVectors, Split) {
  ASSERT_GE(Vectors()["split"].size(), 60u);
  for (const json& c : Vectors()["split"]) {
    SCOPED_TRACE(c.dump());
    const int64_t first = c["first"];
    const int64_t tokens = c["new"];
    const int32_t ranks = c["ranks"];
    for (int32_t rank = 0; rank < ranks; ++rank) {
      std::vector<Chunk> want;
      for (const json& chunk : c["chunks"][static_cast<size_t>(rank)]) want.push_back({chunk[0], chunk[1]});
      const std::vector<Chunk> got = SplitPrefill(first, tokens, ranks, rank);
      EXPECT_EQ(got, want);
      int64_t pairs = 0;
      for (const Chunk& chunk : got) {
        for (int64_t p = chunk.first; p < chunk.first + chunk.tokens; ++p) pairs += p + 1;
      }
      EXPECT_EQ(pairs, c["visible_pairs"][static_cast<size_t>(rank)].get<int64_t>());
    }
  }
}

TEST(CpVectors, Rows) {
  ASSERT_GE(Vectors()["rows"].size(), 60u);
  for (const json& c : Vectors()["rows"]) {
    SCOPED_TRACE(c.dump());
    const KvLayout layout{.block_tokens = 128, .interleave = c["interleave"], .shards = c["shards"]};
    const int64_t first = c["first"];
    for (int64_t row = 0; row < c["rows"].get<int64_t>(); ++row) {
      for (int32_t r = 0; r < layout.shards; ++r) {
        EXPECT_EQ(layout.LocalLen(first + row + 1, r),
                  c["visible"][static_cast<size_t>(row)][static_cast<size_t>(r)].get<int64_t>());
      }
    }
  }
}

TEST(CpVectors, Transfer) {
  ASSERT_GE(Vectors()["transfer"].size(), 60u);
  for (const json& c : Vectors()["transfer"]) {
    SCOPED_TRACE(c.dump());
    std::vector<TransferCopy> want;
    for (const json& copy : c["copies"]) {
      want.push_back({copy[0], copy[1], copy[2], copy[3], copy[4], copy[5], copy[6]});
    }
    const TransferSide producer{.block_tokens = c["producer_block"], .shards = c["producer_shards"]};
    const TransferSide consumer{.block_tokens = c["consumer_block"], .shards = c["consumer_shards"]};
    EXPECT_EQ(PlanTransfer(producer, consumer, c["length"], c["have"]), want);
  }
}

}  // namespace
}  // namespace weft::cp
