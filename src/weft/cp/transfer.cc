#include "weft/cp/transfer.h"

#include <algorithm>

#include "weft/core/error.h"

namespace weft::cp {

std::vector<TransferCopy> PlanTransfer(const TransferSide& producer, const TransferSide& consumer, int64_t length,
                                       int64_t have) {
  WEFT_CHECK(producer.block_tokens >= 1 && producer.shards >= 1 && consumer.block_tokens >= 1 && consumer.shards >= 1);
  WEFT_CHECK(have >= 0, "have = {}", have);
  std::vector<TransferCopy> copies;
  for (int64_t x = have; x < length;) {
    const int64_t from = x / producer.block_tokens;
    const int64_t to = x / consumer.block_tokens;
    const int64_t end = std::min({(from + 1) * producer.block_tokens, (to + 1) * consumer.block_tokens, length});
    copies.push_back({.producer_shard = static_cast<int32_t>(from % producer.shards),
                      .producer_block = from / producer.shards,
                      .producer_offset = static_cast<int32_t>(x % producer.block_tokens),
                      .consumer_shard = static_cast<int32_t>(to % consumer.shards),
                      .consumer_block = to / consumer.shards,
                      .consumer_offset = static_cast<int32_t>(x % consumer.block_tokens),
                      .tokens = static_cast<int32_t>(end - x)});
    x = end;
  }
  return copies;
}

}  // namespace weft::cp
