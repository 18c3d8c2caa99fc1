#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <vector>

#include "weft/cp/layout.h"
#include "weft/cp/test_random.h"

namespace weft::cp {
namespace {

TEST(SplitPrefill, EveryTokenOnceAndNoRankMoreThanTwoChunks) {
  EXPECT_TRUE(rc::check([] {
    const int32_t ranks = InRange(1, 17);
    const int64_t first = InRange<int64_t>(0, 5000);
    const int64_t tokens = InRange<int64_t>(0, *rc::gen::element(4 * ranks + 2, 3000));
    std::vector<int32_t> rank_of(static_cast<size_t>(tokens), -1);
    for (int32_t rank = 0; rank < ranks; ++rank) {
      const std::vector<Chunk> chunks = SplitPrefill(first, tokens, ranks, rank);
      RC_ASSERT(chunks.size() <= 2u);
      int64_t end = first;
      for (const Chunk& chunk : chunks) {
        RC_ASSERT(chunk.tokens >= 1);
        RC_ASSERT(chunk.first >= end);  // ascending
        end = chunk.first + chunk.tokens;
        RC_ASSERT(end <= first + tokens);
        for (int64_t p = chunk.first; p < end; ++p) {
          int32_t& owner = rank_of[static_cast<size_t>(p - first)];
          RC_ASSERT(owner == -1);
          owner = rank;
        }
      }
    }
    for (int64_t i = 0; i < tokens; ++i) {
      RC_ASSERT(rank_of[static_cast<size_t>(i)] >= 0);
    }
  }));
}

TEST(SplitPrefill, CausalWorkIsEqualWhenTheChunksAre) {
  EXPECT_TRUE(rc::check([] {
    const int32_t ranks = InRange(1, 17);
    const int64_t first = InRange<int64_t>(0, 1000);
    const int64_t tokens = 2 * ranks * InRange<int64_t>(1, 50);
    int64_t work0 = -1;
    for (int32_t rank = 0; rank < ranks; ++rank) {
      int64_t work = 0;
      for (const Chunk& chunk : SplitPrefill(first, tokens, ranks, rank)) {
        for (int64_t p = chunk.first; p < chunk.first + chunk.tokens; ++p) work += p + 1;
      }
      if (rank == 0) work0 = work;
      RC_ASSERT(work == work0);
    }
  }));
}

TEST(SplitPrefill, OneTokenGoesToTheFirstRankAlone) {
  EXPECT_EQ(SplitPrefill(7, 1, 4, 0), (std::vector<Chunk>{{7, 1}}));
  for (int32_t rank = 1; rank < 4; ++rank) EXPECT_TRUE(SplitPrefill(7, 1, 4, rank).empty());
}

}  // namespace
}  // namespace weft::cp
