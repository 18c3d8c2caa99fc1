#include <algorithm>

#include "weft/core/error.h"
#include "weft/cp/layout.h"

namespace weft::cp {
namespace {

int64_t ChunkTokens(int64_t tokens, int32_t ranks) { return (tokens + 2 * int64_t{ranks} - 1) / (2 * int64_t{ranks}); }

}  // namespace

std::vector<Chunk> SplitPrefill(int64_t first, int64_t tokens, int32_t ranks, int32_t rank) {
  WEFT_CHECK(first >= 0 && tokens >= 0 && ranks >= 1 && rank >= 0 && rank < ranks,
             "first = {}, tokens = {}, ranks = {}, rank = {}", first, tokens, ranks, rank);
  const int64_t size = ChunkTokens(tokens, ranks);
  std::vector<Chunk> chunks;
  for (const int64_t index : {int64_t{rank}, 2 * int64_t{ranks} - 1 - rank}) {
    const int64_t begin = std::min(index * size, tokens);
    const int64_t end = std::min(begin + size, tokens);
    if (begin < end) chunks.push_back({first + begin, end - begin});
  }
  return chunks;
}

}  // namespace weft::cp
