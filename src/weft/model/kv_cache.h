#pragma once
// One rank's shard of the paged KV cache: the memory, without any knowledge of who owns what.

#include <cstdint>
#include <vector>

#include "weft/core/buffer.h"
#include "weft/core/dtype.h"

namespace weft {

struct KvCacheShape {
  DType dtype = DType::kBF16;
  int64_t layers = 0;
  int64_t blocks = 0;
  int32_t block_tokens = 0;
  int64_t kv_heads = 0;  // of this rank
  int64_t k_dim = 0;
  int64_t v_dim = 0;

  int64_t k_block_elements() const { return kv_heads * block_tokens * k_dim; }
  int64_t v_block_elements() const { return kv_heads * block_tokens * v_dim; }
  // Bytes of one block over all layers, keys and values.
  int64_t block_bytes() const {
    return layers * (k_block_elements() + v_block_elements()) * static_cast<int64_t>(SizeOf(dtype));
  }
};

// Per layer keys [blocks, kv_heads, block_tokens, k_dim] and values [blocks, kv_heads, block_tokens, v_dim]: the rows
// of a head lie together within a block, so that attention reads one stream.
class KvCache {
 public:
  explicit KvCache(const KvCacheShape& shape) : shape_(shape) {
    const auto element = static_cast<int64_t>(SizeOf(shape.dtype));
    for (int64_t i = 0; i < shape.layers; ++i) {
      k_.emplace_back(static_cast<size_t>(shape.blocks * shape.k_block_elements() * element));
      v_.emplace_back(static_cast<size_t>(shape.blocks * shape.v_block_elements() * element));
    }
  }

  const KvCacheShape& shape() const { return shape_; }
  void* k(int64_t layer) const { return k_[static_cast<size_t>(layer)].data(); }
  void* v(int64_t layer) const { return v_[static_cast<size_t>(layer)].data(); }

 private:
  KvCacheShape shape_;
  std::vector<Buffer> k_, v_;
};

}  // namespace weft
