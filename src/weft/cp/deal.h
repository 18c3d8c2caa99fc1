#pragma once
// How the query tokens of one step are dealt to the PCP ranks. A prompt long enough to gain is cut head-tail over all
// of them (SplitPrefill); shorter ones, and decode rows, go whole to one rank each, so that the work of each is even:
// the dense part of a token runs on one PCP rank only.

#include <cstdint>
#include <span>
#include <vector>

#include "weft/cp/layout.h"

namespace weft::cp {

// The tokens [first, first + tokens) of one request in a step.
struct QueryItem {
  int64_t first = 0;
  int64_t tokens = 0;
  bool decode = false;
};

// Relative cost of a token, and of a pair of a token and a key that it sees. Any unit; only their ratio counts.
struct QueryCosts {
  double per_token = 1.0;
  double per_pair = 0.0;
  // Prompts of fewer new tokens are not cut: a matrix product of very few rows takes as long as one of half as many.
  int64_t min_tokens_to_cut = 1;
};

// The cost of positions [first, first + tokens), the one at position p seeing p + 1 keys.
double WorkOf(const QueryCosts& costs, int64_t first, int64_t tokens);

struct DealtChunk {
  size_t item = 0;  // index into the items
  Chunk chunk;
  friend bool operator==(const DealtChunk&, const DealtChunk&) = default;
};

// Element r: the chunks of rank r, in the order of the items and, within an item, of the positions; chunks of an item
// that touch are joined. Every token is dealt exactly once. A function of its arguments alone, so that all ranks agree.
std::vector<std::vector<DealtChunk>> DealQueries(std::span<const QueryItem> items, const QueryCosts& costs,
                                                 int32_t ranks);

}  // namespace weft::cp
