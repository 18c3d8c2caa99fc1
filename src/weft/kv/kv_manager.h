#pragma once
// KV cache memory of requests, in virtual blocks: one table serves all shards (docs/context_parallel.md).

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "weft/cp/layout.h"
#include "weft/kv/block_pool.h"
#include "weft/kv/prefix_cache.h"

namespace weft {

// A request's virtual blocks, in order: tokens [i*B*W, (i+1)*B*W) lie in blocks[i].
struct BlockTable {
  std::vector<int32_t> blocks;
  PrefixCache::Cursor cursor;  // what of it the prefix cache knows
};

// KV of the beginning of a sequence that is in the cache already.
struct PrefixHit {
  int64_t tokens = 0;           // so many, copied ones included
  std::vector<int32_t> blocks;  // full blocks, to be shared
  PrefixCache::Cursor cursor;   // their place in the prefix cache
  // The first `copy_tokens` tokens of this block are those that follow; to be copied into the next block of the table
  // before anything is computed, since the block goes on with other tokens. -1: none.
  int32_t copy_source = -1;
  int64_t copy_tokens = 0;
};

// Gives tables their blocks, and knows what is in those of former tables. All counts of tokens are global (over all
// shards) and from the sequence's start.
class KvManager {
 public:
  // `num_blocks`: virtual blocks, which is the number of physical blocks of each rank.
  KvManager(const cp::KvLayout& layout, int64_t num_blocks, bool prefix_caching = true);

  const cp::KvLayout& layout() const { return layout_; }
  int64_t num_blocks() const { return pool_.size(); }
  bool prefix_caching() const { return caching_; }
  // Blocks that nobody uses, though the prefix cache may know what is in them.
  int64_t num_free_blocks() const { return pool_.num_free(); }
  // Blocks that the prefix cache knows, used or not.
  int64_t num_cached_blocks() const { return cache_.size(); }
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
  // Gives all blocks back and empties the table. What is known of them can be found until they are needed.
  void Free(BlockTable& table);

  // Free blocks that AllocateWithPrefix takes for a hit and `tokens` tokens, the copy's source left aside.
  int64_t BlocksToTake(const PrefixHit& hit, int64_t tokens) const;

  // The longest known beginning of `tokens` (to be computed: at least the last one, so at most all others are looked
  // for). Only of sequences with the same salt.
  PrefixHit FindPrefix(const std::string& salt, std::span<const int32_t> tokens) const;
  // Makes an empty table hold the first `tokens` tokens, those of the hit in its blocks, and leaves `spare` blocks
  // free. False where the pool has too few; nothing has changed then. The copy is dropped from the hit where there is
  // no room for both ends of it; else its source is kept from reuse until Unpin(hit.copy_source).
  [[nodiscard]] bool AllocateWithPrefix(BlockTable& table, PrefixHit& hit, int64_t tokens, int64_t spare);
  void Unpin(int32_t block) { pool_.Release(block); }
  // Lets others find what is in the table's blocks: `tokens`, all of them computed. Without `with_partial` full blocks
  // alone (cheap where there is no new one).
  void Publish(const std::string& salt, BlockTable& table, std::span<const int32_t> tokens, bool with_partial);
  // Makes the prefix cache forget the table's blocks from index `first` on, and all behind them: what is in them is
  // bad.
  void Unpublish(BlockTable& table, size_t first);

 private:
  // A block without users; what was known of it, and of those behind it, is forgotten.
  int32_t TakeBlock();
  void Mark(const std::vector<int32_t>& changed);

  cp::KvLayout layout_;
  bool caching_;
  // Fewer tokens are not worth a copy.
  int64_t min_copy_tokens_;
  BlockPool pool_;
  PrefixCache cache_;
};

}  // namespace weft
