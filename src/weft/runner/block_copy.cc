#include "weft/runner/block_copy.h"

#include <cstring>

#include "weft/core/error.h"

namespace weft {

void CopyBlock(const BlockCopy& copy, const cp::KvLayout& layout, int32_t shard, const KvCache& cache,
               ThreadPool& pool) {
  const KvCacheShape& shape = cache.shape();
  WEFT_CHECK(copy.source >= 0 && copy.source < shape.blocks && copy.destination >= 0 &&
                 copy.destination < shape.blocks && copy.source != copy.destination,
             "copy of block {} to {} of {}", copy.source, copy.destination, shape.blocks);
  WEFT_CHECK(copy.tokens >= 0 && copy.tokens <= layout.VirtualBlockTokens(), "{} tokens of a block of {}", copy.tokens,
             layout.VirtualBlockTokens());
  const int64_t rows = layout.LocalLen(copy.tokens, shard);
  if (rows == 0) return;
  const auto element = static_cast<int64_t>(SizeOf(shape.dtype));
  // Of [blocks, heads, block_tokens, dim]: the rows of a head lie together.
  const auto copy_head = [&](void* memory, int64_t head, int64_t dim) {
    if (dim == 0) return;  // no values of their own (MLA)
    auto* bytes = static_cast<std::byte*>(memory);
    const int64_t head_bytes = shape.block_tokens * dim * element;
    std::memcpy(bytes + (copy.destination * shape.kv_heads + head) * head_bytes,
                bytes + (copy.source * shape.kv_heads + head) * head_bytes, static_cast<size_t>(rows * dim * element));
  };
  pool.ParallelFor(shape.layers * shape.kv_heads, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      copy_head(cache.k(i / shape.kv_heads), i % shape.kv_heads, shape.k_dim);
      copy_head(cache.v(i / shape.kv_heads), i % shape.kv_heads, shape.v_dim);
    }
  });
}

}  // namespace weft
