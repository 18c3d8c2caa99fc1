#include "weft/kv/block_pool.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <deque>
#include <map>

#include "weft/cp/test_random.h"

namespace weft {
namespace {

using cp::InRange;

// Against a plain queue and a map of counts.
TEST(BlockPool, BehavesLikeAQueue) {
  EXPECT_TRUE(rc::check([] {
    const int32_t size = InRange(0, 20);
    BlockPool pool(size);
    std::deque<int32_t> queue;
    std::map<int32_t, int32_t> refs;
    for (int32_t b = 0; b < size; ++b) queue.push_back(b);
    for (int i = InRange(0, 200); i > 0; --i) {
      switch (InRange(0, 4)) {
        case 0:
        case 1:
          if (!queue.empty()) {
            const int32_t block = pool.Allocate();
            RC_ASSERT(block == queue.front());
            queue.pop_front();
            refs[block] = 1;
          }
          break;
        case 2:
          if (size > 0) {
            const int32_t block = InRange(0, size);
            pool.AddRef(block);
            if (refs[block]++ == 0) std::erase(queue, block);
          }
          break;
        default:
          if (size > 0) {
            const int32_t block = InRange(0, size);
            if (refs[block] == 0) break;
            pool.Release(block);
            if (--refs[block] == 0) queue.push_back(block);
          }
      }
      RC_ASSERT(pool.num_free() == static_cast<int64_t>(queue.size()));
      for (int32_t b = 0; b < size; ++b) RC_ASSERT(pool.refs(b) == refs[b]);
    }
    while (!queue.empty()) {
      RC_ASSERT(pool.Allocate() == queue.front());
      queue.pop_front();
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
