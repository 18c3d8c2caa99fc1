#pragma once
// Which tokens of which block go where when the KV cache of a sequence moves between two layouts (prefill and decode
// instances, KV pool). Both sides must have interleave = block size, so that a physical block holds consecutive tokens:
// block b of a sequence lies on shard b % shards as that shard's block b / shards.

#include <cstdint>
#include <vector>

namespace weft::cp {

struct TransferSide {
  int32_t block_tokens = 128;
  int32_t shards = 1;
};

// One run of tokens inside one producer block and one consumer block. Blocks are counted along the sequence on their
// own shard, which is the index into the request's block table of that side.
struct TransferCopy {
  int32_t producer_shard = 0;
  int64_t producer_block = 0;
  int32_t producer_offset = 0;  // tokens
  int32_t consumer_shard = 0;
  int64_t consumer_block = 0;
  int32_t consumer_offset = 0;  // tokens
  int32_t tokens = 0;
  friend bool operator==(const TransferCopy&, const TransferCopy&) = default;
};

// The copies that bring tokens [have, length) to the consumer, in order of position. Any block sizes and shard counts
// go together; nothing has to divide anything.
std::vector<TransferCopy> PlanTransfer(const TransferSide& producer, const TransferSide& consumer, int64_t length,
                                       int64_t have);

}  // namespace weft::cp
