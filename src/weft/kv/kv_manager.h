#pragma once
// KV cache memory of requests, in virtual blocks: one table serves all shards (docs/context_parallel.md).

#include <cstdint>
#include <vector>

#include "weft/cp/layout.h"
#include "weft/kv/block_pool.h"

namespace weft {

// A request's virtual blocks, in order: tokens [i*B*W, (i+1)*B*W) lie in blocks[i].
struct BlockTable {
  std::vector<int32_t> blocks;
};

// Gives tables their blocks. All counts of tokens are global (over all shards) and from the sequence's start.
class KvManager {
 public:
  // `num_blocks`: virtual blocks, which is the number of physical blocks of each rank.
  KvManager(const cp::KvLayout& layout, int64_t num_blocks);

  const cp::KvLayout& layout() const { return layout_; }
  int64_t num_blocks() const { return pool_.size(); }
  int64_t num_free_blocks() const { return pool_.num_free(); }
  // The longest sequence that fits when it has the cache for itself.
  int64_t CapacityTokens() const { return pool_.size() * layout_.VirtualBlockTokens(); }
  // Share of the blocks that is in use, 0 .. 1.
  double Usage() const;

  // How many blocks the table lacks to hold the first `tokens` tokens.
  int64_t BlocksToAdd(const BlockTable& table, int64_t tokens) const;
  // Whether Allocate would succeed and leave `spare` blocks free.
  bool CanAllocate(const BlockTable& table, int64_t tokens, int64_t spare = 0) const;
  // Makes the table hold the first `tokens` tokens. False where the pool has too few blocks; nothing has changed then.
  [[nodiscard]] bool Allocate(BlockTable& table, int64_t tokens);
  // Gives all blocks back and empties the table.
  void Free(BlockTable& table);

 private:
  cp::KvLayout layout_;
  BlockPool pool_;
};

}  // namespace weft
