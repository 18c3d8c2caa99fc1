#include "weft/cp/deal.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>

namespace weft::cp {
namespace {

TEST(Deal, EveryTokenOnceAndEvenWork) {
  const uint64_t seed = std::random_device{}();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::mt19937_64 rng(seed);
  auto below = [&](int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(rng); };
  for (int round = 0; round < 500; ++round) {
    const auto ranks = static_cast<int32_t>(1 + below(8));
    QueryCosts costs{.per_token = 1.0 + static_cast<double>(below(100)),
                     .per_pair = static_cast<double>(below(3)) * 0.01,
                     .min_tokens_to_cut = 1 + below(80)};
    std::vector<QueryItem> items;
    for (int64_t i = below(20); i >= 0; --i) {
      const bool decode = below(2) == 0;
      items.push_back({below(500), decode ? 1 : 1 + below(300), decode});
    }
    const auto dealt = DealQueries(items, costs, ranks);
    ASSERT_EQ(dealt.size(), static_cast<size_t>(ranks));
    std::set<std::pair<size_t, int64_t>> seen;
    std::vector<double> load;
    double largest_whole = 0;
    double uneven_cuts = 0;
    for (const auto& chunks : dealt) {
      double sum = 0;
      for (size_t k = 0; k < chunks.size(); ++k) {
        const auto& [item, chunk] = chunks[k];
        ASSERT_GE(chunk.tokens, 1);
        if (k > 0) {
          ASSERT_LE(chunks[k - 1].item, item);
          if (chunks[k - 1].item == item) {
            ASSERT_LT(chunks[k - 1].chunk.first + chunks[k - 1].chunk.tokens, chunk.first);
          }
        }
        for (int64_t x = chunk.first; x < chunk.first + chunk.tokens; ++x) {
          // One by one: the formula of WorkOf has its oracle here.
          sum += costs.per_token + costs.per_pair * static_cast<double>(x + 1);
          ASSERT_TRUE(seen.emplace(item, x).second) << item << " " << x;
        }
      }
      load.push_back(sum);
    }
    int64_t total = 0;
    for (size_t i = 0; i < items.size(); ++i) {
      total += items[i].tokens;
      for (int64_t x = items[i].first; x < items[i].first + items[i].tokens; ++x) ASSERT_TRUE(seen.contains({i, x}));
      const double work = WorkOf(costs, items[i].first, items[i].tokens);
      if (items[i].decode || items[i].tokens < costs.min_tokens_to_cut) {
        largest_whole = std::max(largest_whole, work);
      } else {
        // Chunks differ by the clipping of the last ones, at most two chunks' worth.
        uneven_cuts +=
            2 * WorkOf(costs, items[i].first + items[i].tokens, (items[i].tokens + 2 * ranks - 1) / (2 * ranks));
      }
    }
    ASSERT_EQ(seen.size(), static_cast<size_t>(total));
    const double most = *std::max_element(load.begin(), load.end());
    const double least = *std::min_element(load.begin(), load.end());
    ASSERT_LE(most - least, largest_whole + uneven_cuts + 1e-6);
  }
}

TEST(Deal, ShortPromptsStayWholeAndLongOnesAreCut) {
  const std::vector<QueryItem> items = {{0, 10, false}, {0, 1000, false}, {0, 11, false}, {40, 1, true}};
  const auto dealt = DealQueries(items, {.min_tokens_to_cut = 64}, 2);
  EXPECT_EQ(dealt[0], (std::vector<DealtChunk>{{1, {0, 250}}, {1, {750, 250}}, {2, {0, 11}}}));
  EXPECT_EQ(dealt[1], (std::vector<DealtChunk>{{0, {0, 10}}, {1, {250, 500}}, {3, {40, 1}}}));
}

}  // namespace
}  // namespace weft::cp
