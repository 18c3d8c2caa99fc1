// The closed formulas against tokens placed one by one.
#include "weft/cp/layout.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <algorithm>
#include <vector>

#include "weft/cp/test_random.h"

namespace weft::cp {
namespace {

KvLayout AnyLayout() {
  const int32_t interleave = *rc::gen::element(1, 2, 3, 4, 8, 16, 128);
  const int32_t block = interleave * InRange(1, 6);
  return {.block_tokens = block, .interleave = interleave, .shards = InRange(1, 10)};
}

// A length on, one below or one above an edge of the layout, or anything.
int64_t AnyLength(const KvLayout& layout) {
  const int64_t edge = *rc::gen::element<int64_t>(
      layout.interleave, layout.block_tokens, int64_t{layout.interleave} * layout.shards, layout.VirtualBlockTokens());
  const int64_t near = edge * InRange<int64_t>(0, 4) + InRange<int64_t>(-1, 2);
  const int64_t any = InRange<int64_t>(0, 3 * layout.VirtualBlockTokens());
  return std::max<int64_t>(0, *rc::gen::element(near, any));
}

// Deals tokens 0, 1, ... out: `interleave` to a shard, then to the next one, round and round. Each shard appends to its
// last block. Element r: the global positions that shard r holds, in storage order.
std::vector<std::vector<int64_t>> Deal(const KvLayout& layout, int64_t length) {
  std::vector<std::vector<int64_t>> shards(static_cast<size_t>(layout.shards));
  size_t shard = 0;
  int32_t run = 0;
  for (int64_t x = 0; x < length; ++x) {
    if (run == layout.interleave) {
      shard = (shard + 1) % shards.size();
      run = 0;
    }
    shards[shard].push_back(x);
    ++run;
  }
  return shards;
}

TEST(KvLayout, EveryTokenIsWhereDealingPutsIt) {
  EXPECT_TRUE(rc::check([] {
    const KvLayout layout = AnyLayout();
    const int64_t length = AnyLength(layout);
    const auto shards = Deal(layout, length);
    int64_t total = 0;
    for (int32_t r = 0; r < layout.shards; ++r) {
      const auto& held = shards[static_cast<size_t>(r)];
      RC_ASSERT(layout.LocalLen(length, r) == static_cast<int64_t>(held.size()));
      total += layout.LocalLen(length, r);
      for (size_t k = 0; k < held.size(); ++k) {
        const int64_t x = held[k];
        RC_ASSERT(layout.Owner(x) == r);
        // Stored without gaps and in order: local position = virtual block * B + offset.
        RC_ASSERT(layout.VirtualBlock(x) * layout.block_tokens + layout.Offset(x) == static_cast<int64_t>(k));
        RC_ASSERT(layout.Offset(x) >= 0 && layout.Offset(x) < layout.block_tokens);
        RC_ASSERT(layout.GlobalPosition(static_cast<int64_t>(k), r) == x);
      }
    }
    RC_ASSERT(total == length);
  }));
}

TEST(KvLayout, KeysVisibleToARowAreAPrefixOfTheShard) {
  EXPECT_TRUE(rc::check([] {
    const KvLayout layout = AnyLayout();
    const int64_t length = AnyLength(layout) + 1;
    const int64_t p = InRange<int64_t>(0, length);
    const auto shards = Deal(layout, length);
    for (int32_t r = 0; r < layout.shards; ++r) {
      const auto& held = shards[static_cast<size_t>(r)];
      for (size_t k = 0; k < held.size(); ++k) {
        RC_ASSERT((held[k] <= p) == (static_cast<int64_t>(k) < layout.LocalLen(p + 1, r)));
      }
    }
  }));
}

TEST(KvLayout, BlocksFor) {
  EXPECT_TRUE(rc::check([] {
    const KvLayout layout = AnyLayout();
    const int64_t length = AnyLength(layout);
    RC_ASSERT(layout.BlocksFor(length) == (length == 0 ? 0 : layout.VirtualBlock(length - 1) + 1));
  }));
}

// The formulas stay exact where 32-bit arithmetic would not.
TEST(KvLayout, PositionsBeyond32Bits) {
  EXPECT_TRUE(rc::check([] {
    const KvLayout layout = AnyLayout();
    const int64_t x = InRange<int64_t>(int64_t{1} << 32, int64_t{1} << 48);
    const int64_t k = layout.VirtualBlock(x) * layout.block_tokens + layout.Offset(x);
    RC_ASSERT(layout.GlobalPosition(k, layout.Owner(x)) == x);
    RC_ASSERT(layout.LocalLen(x, layout.Owner(x)) == k);
    RC_ASSERT(layout.LocalLen(x + 1, layout.Owner(x)) == k + 1);
  }));
}

}  // namespace
}  // namespace weft::cp
