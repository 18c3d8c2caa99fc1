#include "weft/cp/deal.h"

#include <algorithm>

#include "weft/core/error.h"

namespace weft::cp {

double WorkOf(const QueryCosts& costs, int64_t first, int64_t tokens) {
  const auto n = static_cast<double>(tokens);
  // Sum of p + 1 over the positions.
  const double pairs = n * static_cast<double>(first) + n * (n + 1) / 2;
  return costs.per_token * n + costs.per_pair * pairs;
}

std::vector<std::vector<DealtChunk>> DealQueries(std::span<const QueryItem> items, const QueryCosts& costs,
                                                 int32_t ranks) {
  WEFT_CHECK(ranks >= 1);
  std::vector<std::vector<DealtChunk>> dealt(static_cast<size_t>(ranks));
  std::vector<double> load(static_cast<size_t>(ranks));
  std::vector<size_t> whole;
  for (size_t i = 0; i < items.size(); ++i) {
    const QueryItem& item = items[i];
    if (item.decode || ranks == 1 || item.tokens < costs.min_tokens_to_cut) {
      whole.push_back(i);
      continue;
    }
    for (int32_t rank = 0; rank < ranks; ++rank) {
      std::vector<Chunk> chunks = SplitPrefill(item.first, item.tokens, ranks, rank);
      if (chunks.size() == 2 && chunks[0].first + chunks[0].tokens == chunks[1].first) {
        chunks[0].tokens += chunks[1].tokens;
        chunks.pop_back();
      }
      for (const Chunk& chunk : chunks) {
        dealt[static_cast<size_t>(rank)].push_back({i, chunk});
        load[static_cast<size_t>(rank)] += WorkOf(costs, chunk.first, chunk.tokens);
      }
    }
  }
  // Longest first to the rank with the least so far: at most 4/3 of the best possible (Graham 1969).
  auto work = [&](size_t i) { return WorkOf(costs, items[i].first, items[i].tokens); };
  std::stable_sort(whole.begin(), whole.end(), [&](size_t a, size_t b) { return work(a) > work(b); });
  for (const size_t i : whole) {
    const auto rank = static_cast<size_t>(std::min_element(load.begin(), load.end()) - load.begin());
    dealt[rank].push_back({i, {items[i].first, items[i].tokens}});
    load[rank] += work(i);
  }
  for (auto& chunks : dealt) {
    std::stable_sort(chunks.begin(), chunks.end(),
                     [](const DealtChunk& a, const DealtChunk& b) { return a.item < b.item; });
  }
  return dealt;
}

}  // namespace weft::cp
