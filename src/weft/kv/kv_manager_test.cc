#include "weft/kv/kv_manager.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <algorithm>
#include <set>

#include "weft/cp/test_random.h"

namespace weft {
namespace {

using cp::InRange;

TEST(KvManager, TablesHoldTheirTokensAndShareNothing) {
  EXPECT_TRUE(rc::check([] {
    const int32_t interleave = *rc::gen::element(1, 2, 4);
    const cp::KvLayout layout{
        .block_tokens = interleave * InRange(1, 4), .interleave = interleave, .shards = InRange(1, 5)};
    const int64_t blocks = InRange<int64_t>(0, 12);
    KvManager kv(layout, blocks);
    RC_ASSERT(kv.CapacityTokens() == blocks * layout.block_tokens * layout.shards);
    std::vector<BlockTable> tables(4);
    for (int i = InRange(0, 60); i > 0; --i) {
      BlockTable& table = tables[InRange<size_t>(0, tables.size())];
      if (InRange(0, 3) == 0) {
        kv.Free(table);
        RC_ASSERT(table.blocks.empty());
      } else {
        const int64_t tokens = InRange<int64_t>(0, kv.CapacityTokens() + 2);
        const std::vector<int32_t> before = table.blocks;
        const int64_t free = kv.num_free_blocks();
        const int64_t lacking = kv.BlocksToAdd(table, tokens);
        RC_ASSERT(kv.CanAllocate(table, tokens) == (lacking <= free));
        RC_ASSERT(kv.CanAllocate(table, tokens, 2) == (lacking + 2 <= free));
        if (kv.Allocate(table, tokens)) {
          RC_ASSERT(lacking <= free);
          const int64_t room = static_cast<int64_t>(table.blocks.size()) * layout.VirtualBlockTokens();
          RC_ASSERT(room >= tokens);
          RC_ASSERT(table.blocks.size() == before.size() || room - tokens < layout.VirtualBlockTokens());
          RC_ASSERT(std::equal(before.begin(), before.end(), table.blocks.begin()));  // it only grows
        } else {
          RC_ASSERT(lacking > free);
          RC_ASSERT(table.blocks == before);
        }
      }
      std::set<int32_t> used;
      size_t count = 0;
      for (const BlockTable& t : tables) {
        used.insert(t.blocks.begin(), t.blocks.end());
        count += t.blocks.size();
      }
      RC_ASSERT(used.size() == count);
      RC_ASSERT(kv.num_free_blocks() == blocks - static_cast<int64_t>(count));
      RC_ASSERT(kv.Usage() * static_cast<double>(blocks) <= static_cast<double>(count) + 1e-9);
      RC_ASSERT(kv.Usage() * static_cast<double>(blocks) >= static_cast<double>(blocks ? count : 0) - 1e-9);
    }
  }));
}

TEST(KvManager, TheBeginningOfASequenceIsReusedLast) {
  KvManager kv({.block_tokens = 1, .interleave = 1, .shards = 1}, 3);
  BlockTable table;
  ASSERT_TRUE(kv.Allocate(table, 3));
  const std::vector<int32_t> blocks = table.blocks;
  kv.Free(table);
  ASSERT_TRUE(kv.Allocate(table, 3));
  EXPECT_EQ(table.blocks, std::vector<int32_t>(blocks.rbegin(), blocks.rend()));
}

}  // namespace
}  // namespace weft
