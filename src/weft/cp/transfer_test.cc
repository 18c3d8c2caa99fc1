#include "weft/cp/transfer.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "weft/cp/layout.h"
#include "weft/cp/test_random.h"

namespace weft::cp {
namespace {

// Puts the token numbers into blocks as the producer lays them out, carries the copies out, and reads the consumer's.
// Empty, or what is wrong.
std::string Carry(const TransferSide& producer, const TransferSide& consumer, int64_t length, int64_t have) {
  using Place = std::tuple<int32_t, int64_t, int64_t>;  // shard, block, offset
  const auto place = [](const TransferSide& s, int64_t x) {
    const KvLayout layout{.block_tokens = s.block_tokens, .interleave = s.block_tokens, .shards = s.shards};
    return Place{layout.Owner(x), layout.VirtualBlock(x), layout.Offset(x)};
  };
  std::map<Place, int64_t> source;
  for (int64_t x = 0; x < length; ++x) source[place(producer, x)] = x;

  std::map<Place, int64_t> arrived;
  for (const TransferCopy& c : PlanTransfer(producer, consumer, length, have)) {
    if (c.tokens < 1) return "a copy of nothing";
    if (c.producer_offset + c.tokens > producer.block_tokens) return "beyond the producer's block";
    if (c.consumer_offset + c.tokens > consumer.block_tokens) return "beyond the consumer's block";
    for (int32_t i = 0; i < c.tokens; ++i) {
      const auto from = source.find({c.producer_shard, c.producer_block, c.producer_offset + i});
      if (from == source.end()) return "from where nothing is";
      if (!arrived.emplace(Place{c.consumer_shard, c.consumer_block, c.consumer_offset + i}, from->second).second) {
        return "two tokens to one place";
      }
    }
  }
  if (static_cast<int64_t>(arrived.size()) != length - have) return "not as many tokens as asked for";
  for (int64_t x = have; x < length; ++x) {
    const auto at = arrived.find(place(consumer, x));
    if (at == arrived.end() || at->second != x) return "token " + std::to_string(x) + " is not in its place";
  }
  return "";
}

TEST(PlanTransfer, CarriedOutItGivesTheConsumersLayout) {
  EXPECT_TRUE(rc::check([] {
    const auto side = [] { return TransferSide{.block_tokens = InRange(1, 20), .shards = InRange(1, 9)}; };
    const TransferSide producer = side();
    const TransferSide consumer = side();
    const int64_t length = InRange<int64_t>(0, 400);
    const int64_t have = InRange<int64_t>(0, length + 1);
    const std::string problem = Carry(producer, consumer, length, have);
    if (!problem.empty()) RC_FAIL(problem);
  }));
}

constexpr TransferSide kFour{.block_tokens = 8, .shards = 4};
constexpr TransferSide kTwoOfOtherBlocks{.block_tokens = 12, .shards = 2};

TEST(PlanTransfer, PartialLastBlock) {
  for (const int64_t length : {1, 7, 9, 31, 33, 97}) {
    EXPECT_EQ(Carry(kFour, kTwoOfOtherBlocks, length, 0), "");
    EXPECT_EQ(Carry(kTwoOfOtherBlocks, kFour, length, 0), "");
  }
  // Token 32 alone is in the producer's last block, the second of shard 0.
  const auto copies = PlanTransfer(kFour, kTwoOfOtherBlocks, 33, 32);
  EXPECT_EQ(copies, (std::vector<TransferCopy>{{.producer_shard = 0,
                                                .producer_block = 1,
                                                .producer_offset = 0,
                                                .consumer_shard = 0,
                                                .consumer_block = 1,
                                                .consumer_offset = 8,
                                                .tokens = 1}}));
}

TEST(PlanTransfer, PrefixAlreadyOnTheConsumer) {
  for (const int64_t have : {1, 8, 11, 12, 13, 24, 96, 97}) {
    EXPECT_EQ(Carry(kFour, kTwoOfOtherBlocks, 97, have), "");
    EXPECT_EQ(Carry(kTwoOfOtherBlocks, kFour, 97, have), "");
  }
  EXPECT_TRUE(PlanTransfer(kFour, kTwoOfOtherBlocks, 97, 97).empty());
}

TEST(PlanTransfer, FewerShardsToMoreAndBack) {
  for (const int32_t more : {2, 3, 8}) {
    const TransferSide one{.block_tokens = 8, .shards = 1};
    const TransferSide many{.block_tokens = 8, .shards = more};
    for (const int64_t length : {5, 64, 67}) {
      EXPECT_EQ(Carry(one, many, length, 0), "");
      EXPECT_EQ(Carry(many, one, length, 0), "");
    }
  }
}

// A shard that holds none of the tokens is in no copy: it has nothing to wait for.
TEST(PlanTransfer, ShardsWithNothingToReceive) {
  const TransferSide eight{.block_tokens = 8, .shards = 8};
  for (const TransferCopy& copy : PlanTransfer(kFour, eight, 20, 0)) EXPECT_LT(copy.consumer_shard, 3);
  EXPECT_EQ(Carry(kFour, eight, 20, 0), "");
}

}  // namespace
}  // namespace weft::cp
