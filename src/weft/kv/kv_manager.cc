#include "weft/kv/kv_manager.h"

#include <algorithm>

#include "weft/core/error.h"

namespace weft {

KvManager::KvManager(const cp::KvLayout& layout, int64_t num_blocks) : layout_(layout), pool_(num_blocks) {
  WEFT_CHECK(layout.block_tokens >= 1 && layout.shards >= 1 && layout.interleave >= 1 &&
                 layout.block_tokens % layout.interleave == 0,
             "block_tokens = {}, interleave = {}, shards = {}", layout.block_tokens, layout.interleave, layout.shards);
}

double KvManager::Usage() const {
  if (pool_.size() == 0) return 0;
  return 1.0 - static_cast<double>(pool_.num_free()) / static_cast<double>(pool_.size());
}

int64_t KvManager::BlocksToAdd(const BlockTable& table, int64_t tokens) const {
  return std::max<int64_t>(0, layout_.BlocksFor(tokens) - static_cast<int64_t>(table.blocks.size()));
}

bool KvManager::CanAllocate(const BlockTable& table, int64_t tokens, int64_t spare) const {
  return BlocksToAdd(table, tokens) <= pool_.num_free() - spare;
}

bool KvManager::Allocate(BlockTable& table, int64_t tokens) {
  const int64_t lacking = BlocksToAdd(table, tokens);
  if (lacking > pool_.num_free()) return false;
  for (int64_t i = 0; i < lacking; ++i) table.blocks.push_back(pool_.Allocate());
  return true;
}

void KvManager::Free(BlockTable& table) {
  // Last block first: of what is taken again first, the beginning of a sequence, which others may share, comes last.
  for (auto block = table.blocks.rbegin(); block != table.blocks.rend(); ++block) pool_.Release(*block);
  table.blocks.clear();
}

}  // namespace weft
