#include "weft/kv/kv_manager.h"

#include <algorithm>

#include "weft/core/error.h"

namespace weft {

KvManager::KvManager(const cp::KvLayout& layout, int64_t num_blocks, bool prefix_caching)
    : layout_(layout),
      caching_(prefix_caching),
      min_copy_tokens_(std::clamp<int64_t>(layout.block_tokens / 8, 1, 16)),
      pool_(num_blocks),
      cache_(layout.VirtualBlockTokens(), num_blocks) {
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
  for (int64_t i = 0; i < lacking; ++i) table.blocks.push_back(TakeBlock());
  return true;
}

void KvManager::Free(BlockTable& table) {
  // Last block first: the blocks are taken again in this order, and those of the beginning, without which the others
  // are of no use and which more sequences share, are to go last.
  for (auto block = table.blocks.rbegin(); block != table.blocks.rend(); ++block) pool_.Release(*block);
  table = {};
}

int32_t KvManager::TakeBlock() {
  const int32_t block = pool_.Allocate();
  if (cache_.Knows(block)) {
    std::vector<int32_t> changed;
    cache_.Remove(block, changed);
    Mark(changed);
  }
  return block;
}

void KvManager::Mark(const std::vector<int32_t>& changed) {
  for (const int32_t block : changed) pool_.SetKept(block, cache_.Knows(block));
}

PrefixHit KvManager::FindPrefix(const std::string& salt, std::span<const int32_t> tokens) const {
  PrefixHit hit;
  if (!caching_ || tokens.empty()) return hit;
  PrefixCache::Match match = cache_.Find(salt, tokens.first(tokens.size() - 1));
  hit.tokens = static_cast<int64_t>(match.blocks.size()) * layout_.VirtualBlockTokens();
  hit.cursor = {match.node, match.blocks.size()};
  hit.blocks = std::move(match.blocks);
  if (match.partial_tokens >= min_copy_tokens_) {
    hit.copy_source = match.partial_block;
    hit.copy_tokens = match.partial_tokens;
    hit.tokens += hit.copy_tokens;
  }
  return hit;
}

int64_t KvManager::BlocksToTake(const PrefixHit& hit, int64_t tokens) const {
  // Shared blocks that nobody else uses are no longer free afterwards, like new ones.
  const auto idle = std::ranges::count_if(hit.blocks, [&](int32_t block) { return pool_.refs(block) == 0; });
  return layout_.BlocksFor(tokens) - static_cast<int64_t>(hit.blocks.size()) + idle;
}

bool KvManager::AllocateWithPrefix(BlockTable& table, PrefixHit& hit, int64_t tokens, int64_t spare) {
  WEFT_CHECK(table.blocks.empty() && hit.tokens <= tokens);
  const int64_t wanted = BlocksToTake(hit, tokens);
  if (wanted > pool_.num_free() - spare) return false;
  if (hit.copy_source >= 0 && pool_.refs(hit.copy_source) == 0 && wanted + 1 > pool_.num_free() - spare) {
    hit.tokens -= hit.copy_tokens;
    hit.copy_source = -1;
    hit.copy_tokens = 0;
  }
  for (const int32_t block : hit.blocks) pool_.AddRef(block);
  if (hit.copy_source >= 0) pool_.AddRef(hit.copy_source);
  table = {hit.blocks, hit.cursor};
  WEFT_CHECK(Allocate(table, tokens));
  return true;
}

void KvManager::Publish(const std::string& salt, BlockTable& table, std::span<const int32_t> tokens,
                        bool with_partial) {
  if (!caching_) return;
  std::vector<int32_t> changed;
  cache_.Insert(salt, tokens, table.blocks, with_partial, table.cursor, changed);
  Mark(changed);
}

void KvManager::Unpublish(BlockTable& table, size_t first) {
  std::vector<int32_t> changed;
  for (size_t i = first; i < table.blocks.size(); ++i) {
    if (cache_.Knows(table.blocks[i])) cache_.Remove(table.blocks[i], changed);
  }
  Mark(changed);
}

}  // namespace weft
