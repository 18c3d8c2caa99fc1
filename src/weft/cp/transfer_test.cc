#include "weft/cp/transfer.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <map>
#include <tuple>

#include "weft/cp/layout.h"
#include "weft/cp/test_random.h"

namespace weft::cp {
namespace {

// Puts the token numbers into blocks as the producer lays them out, carries the copies out, and reads the consumer's.
TEST(PlanTransfer, CarriedOutItGivesTheConsumersLayout) {
  EXPECT_TRUE(rc::check([] {
    const auto side = [] { return TransferSide{.block_tokens = InRange(1, 20), .shards = InRange(1, 9)}; };
    const TransferSide producer = side();
    const TransferSide consumer = side();
    const int64_t length = InRange<int64_t>(0, 400);
    const int64_t have = InRange<int64_t>(0, length + 1);

    using Place = std::tuple<int32_t, int64_t, int64_t>;  // shard, block, offset
    const auto place = [](const TransferSide& s, int64_t x) {
      const KvLayout layout{.block_tokens = s.block_tokens, .interleave = s.block_tokens, .shards = s.shards};
      return Place{layout.Owner(x), layout.VirtualBlock(x), layout.Offset(x)};
    };
    std::map<Place, int64_t> source;
    for (int64_t x = 0; x < length; ++x) source[place(producer, x)] = x;

    std::map<Place, int64_t> arrived;
    for (const TransferCopy& c : PlanTransfer(producer, consumer, length, have)) {
      RC_ASSERT(c.tokens >= 1);
      RC_ASSERT(c.producer_offset + c.tokens <= producer.block_tokens);
      RC_ASSERT(c.consumer_offset + c.tokens <= consumer.block_tokens);
      for (int32_t i = 0; i < c.tokens; ++i) {
        const auto from = source.find({c.producer_shard, c.producer_block, c.producer_offset + i});
        RC_ASSERT(from != source.end());
        RC_ASSERT(
            arrived.emplace(Place{c.consumer_shard, c.consumer_block, c.consumer_offset + i}, from->second).second);
      }
    }
    RC_ASSERT(static_cast<int64_t>(arrived.size()) == length - have);
    for (int64_t x = have; x < length; ++x) RC_ASSERT(arrived.at(place(consumer, x)) == x);
  }));
}

}  // namespace
}  // namespace weft::cp
