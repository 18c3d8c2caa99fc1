#include "weft/kv/block_pool.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <deque>
#include <map>

#include "weft/cp/test_random.h"

namespace weft {
namespace {

using cp::InRange;

// Against two plain queues and a map of counts.
TEST(BlockPool, HandsOutWhatIsNotKeptFirst) {
  EXPECT_TRUE(rc::check([] {
    const int32_t size = InRange(0, 20);
    BlockPool pool(size);
    std::deque<int32_t> queues[2];
    std::map<int32_t, int32_t> refs;
    std::map<int32_t, bool> kept;
    for (int32_t b = 0; b < size; ++b) queues[0].push_back(b);
    const auto next = [&]() -> std::deque<int32_t>& { return queues[queues[0].empty() ? 1 : 0]; };
    for (int i = InRange(0, 200); i > 0; --i) {
      const int32_t block = size > 0 ? InRange(0, size) : 0;
      switch (InRange(0, 5)) {
        case 0:
        case 1:
          if (!next().empty()) {
            const int32_t got = pool.Allocate();
            RC_ASSERT(got == next().front());
            next().pop_front();
            refs[got] = 1;
          }
          break;
        case 2:
          if (size == 0) break;
          pool.AddRef(block);
          if (refs[block]++ == 0) std::erase(queues[kept[block]], block);
          break;
        case 3:
          if (size == 0) break;
          {
            const bool keep = InRange(0, 2) == 1;
            pool.SetKept(block, keep);
            if (keep == kept[block]) break;
            if (refs[block] == 0) std::erase(queues[kept[block]], block);
            kept[block] = keep;
            if (refs[block] == 0) queues[keep].push_back(block);
          }
          break;
        default:
          if (refs[block] == 0) break;
          pool.Release(block);
          if (--refs[block] == 0) queues[kept[block]].push_back(block);
      }
      RC_ASSERT(pool.num_free() == static_cast<int64_t>(queues[0].size() + queues[1].size()));
      RC_ASSERT(pool.num_free_kept() == static_cast<int64_t>(queues[1].size()));
      for (int32_t b = 0; b < size; ++b) {
        RC_ASSERT(pool.refs(b) == refs[b]);
        RC_ASSERT(pool.kept(b) == kept[b]);
      }
    }
    while (!next().empty()) {
      RC_ASSERT(pool.Allocate() == next().front());
      next().pop_front();
    }
  }));
}

TEST(BlockPoolDeathTest, RefusesWhatCannotBe) {
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  BlockPool pool(1);
  EXPECT_DEATH(pool.Release(0), "free already");
  EXPECT_DEATH(pool.Release(1), "block 1 of 1");
  EXPECT_EQ(pool.Allocate(), 0);
  EXPECT_DEATH(pool.Allocate(), "no free block");
}

}  // namespace
}  // namespace weft
