#include "weft/kv/prefix_cache.h"

#include <algorithm>

#include "weft/core/error.h"

namespace weft {
namespace {

int64_t CommonPrefix(std::span<const int32_t> a, std::span<const int32_t> b) {
  const size_t n = std::min(a.size(), b.size());
  return std::mismatch(a.begin(), a.begin() + static_cast<std::ptrdiff_t>(n), b.begin()).first - a.begin();
}

bool StartsWith(std::span<const int32_t> tokens, std::span<const int32_t> beginning) {
  return CommonPrefix(tokens, beginning) == static_cast<int64_t>(beginning.size());
}

bool Less(std::span<const int32_t> a, std::span<const int32_t> b) {
  return std::lexicographical_compare(a.begin(), a.end(), b.begin(), b.end());
}

}  // namespace

bool PrefixCache::TokenOrder::operator()(const Node* a, const Node* b) const { return Less(a->tokens, b->tokens); }
bool PrefixCache::TokenOrder::operator()(const Node* a, std::span<const int32_t> b) const { return Less(a->tokens, b); }
bool PrefixCache::TokenOrder::operator()(std::span<const int32_t> a, const Node* b) const { return Less(a, b->tokens); }

uint64_t PrefixCache::DefaultHash(uint64_t parent, std::span<const int32_t> tokens) {
  // A multiplication and a shift a token scatter well enough for a table whose hits are compared anyway.
  uint64_t hash = parent ^ 0x9e3779b97f4a7c15u;
  for (const int32_t token : tokens) {
    hash = (hash ^ static_cast<uint32_t>(token)) * 0xff51afd7ed558ccdu;
    hash ^= hash >> 32;
  }
  return hash;
}

PrefixCache::PrefixCache(int64_t block_tokens, int64_t num_blocks, Hash hash)
    : block_tokens_(block_tokens), hash_(hash), by_block_(static_cast<size_t>(num_blocks)) {
  WEFT_CHECK(block_tokens >= 1);
}

const PrefixCache::Node* PrefixCache::Root(const std::string& salt) const {
  const auto found = roots_.find(salt);
  return found == roots_.end() ? nullptr : found->second;
}

PrefixCache::Node& PrefixCache::RootOrNew(const std::string& salt) {
  Node*& root = roots_[salt];
  if (root == nullptr) {
    root = &Make(nullptr, -1);
    root->salt = salt;
    root->hash = std::hash<std::string>{}(salt);
  }
  return *root;
}

PrefixCache::Node& PrefixCache::Make(Node* parent, int32_t block) {
  auto node = std::make_unique<Node>();
  node->id = next_id_++;
  node->parent = parent;
  node->block = block;
  if (block >= 0) {
    by_block_[static_cast<size_t>(block)] = node.get();
    ++size_;
  }
  Node& made = *node;
  nodes_.emplace(made.id, std::move(node));
  return made;
}

PrefixCache::Node* PrefixCache::FindFull(const Node& parent, uint64_t hash, std::span<const int32_t> tokens) const {
  const auto [begin, end] = by_hash_.equal_range(hash);
  for (auto it = begin; it != end; ++it) {
    if (it->second->parent == &parent && std::ranges::equal(it->second->tokens, tokens)) return it->second;
  }
  return nullptr;
}

PrefixCache::Match PrefixCache::Find(const std::string& salt, std::span<const int32_t> tokens) const {
  Match match;
  const Node* node = Root(salt);
  if (node == nullptr) return match;
  const auto whole = static_cast<size_t>(block_tokens_);
  while (tokens.size() >= whole) {
    const auto block = tokens.first(whole);
    const Node* child = FindFull(*node, hash_(node->hash, block), block);
    if (child == nullptr) break;
    match.blocks.push_back(child->block);
    match.node = child->id;
    node = child;
    tokens = tokens.subspan(whole);
  }
  const auto rest = tokens.first(std::min(tokens.size(), whole));
  const auto consider = [&](const Node& child) {
    const int64_t common = CommonPrefix(child.tokens, rest);
    if (common <= match.partial_tokens) return;
    match.partial_tokens = common;
    match.partial_block = child.block;
  };
  const auto next = node->children.lower_bound(rest);
  if (next != node->children.end()) consider(**next);
  if (next != node->children.begin()) consider(**std::prev(next));
  return match;
}

void PrefixCache::Insert(const std::string& salt, std::span<const int32_t> tokens, std::span<const int32_t> blocks,
                         bool with_partial, Cursor& cursor, std::vector<int32_t>& changed) {
  const auto whole = static_cast<size_t>(block_tokens_);
  const size_t full_blocks = tokens.size() / whole;
  WEFT_CHECK(blocks.size() * whole >= tokens.size(), "{} blocks for {} tokens", blocks.size(), tokens.size());
  if (full_blocks <= cursor.blocks && !with_partial) return;
  const auto found = nodes_.find(cursor.node);
  Node* node = found == nodes_.end() ? nullptr : found->second.get();
  if (node == nullptr) {
    // The sequence begins; or the older twin of one of its blocks has gone, and what was known behind it, too: the
    // sequence's own blocks take their place.
    node = &RootOrNew(salt);
    cursor.blocks = 0;
  }
  for (; cursor.blocks < full_blocks; ++cursor.blocks) {
    const auto content = tokens.subspan(cursor.blocks * whole, whole);
    const int32_t block = blocks[cursor.blocks];
    const uint64_t hash = hash_(node->hash, content);
    Node* child = FindFull(*node, hash, content);
    if (child == nullptr) {
      // It may be known by its first tokens.
      if (Node* part = by_block_[static_cast<size_t>(block)]) Detach(*part, changed);
      child = &Make(node, block);
      child->tokens.assign(content.begin(), content.end());
      child->hash = hash;
      const auto place = node->children.insert(child).first;
      // A shorter block with the same tokens says nothing new any more.
      if (place != node->children.begin()) {
        Node& before = **std::prev(place);
        if (!full(before) && StartsWith(content, before.tokens)) Detach(before, changed);
      }
      by_hash_.emplace(hash, child);
      changed.push_back(block);
    } else if (child->block != block) {
      if (Node* part = by_block_[static_cast<size_t>(block)]) Detach(*part, changed);
    }
    node = child;
    cursor.node = node->id;
  }
  if (with_partial && tokens.size() > full_blocks * whole) {
    InsertPartial(*node, tokens.subspan(full_blocks * whole), blocks[full_blocks], changed);
  }
  if (node->parent == nullptr) DropIfEmpty(*node);
}

void PrefixCache::InsertPartial(Node& parent, std::span<const int32_t> tokens, int32_t block,
                                std::vector<int32_t>& changed) {
  const auto next = parent.children.lower_bound(tokens);
  Node* node = by_block_[static_cast<size_t>(block)];
  if (next != parent.children.end() && StartsWith((*next)->tokens, tokens)) {
    // Known already. If by another block, then this one's shorter beginning is of no use any more.
    if (node != nullptr && node != *next) Detach(*node, changed);
    return;
  }
  if (node != nullptr) {
    // This block's own beginning: it has grown.
    WEFT_CHECK(node->parent == &parent && node->children.empty() && !full(*node), "block {} has two places", block);
    parent.children.erase(node);
  } else {
    node = &Make(&parent, block);
    changed.push_back(block);
  }
  node->tokens.assign(tokens.begin(), tokens.end());
  const auto place = parent.children.insert(node).first;
  if (place != parent.children.begin()) {
    Node& before = **std::prev(place);
    if (!full(before) && StartsWith(tokens, before.tokens)) Detach(before, changed);
  }
}

void PrefixCache::Remove(int32_t block, std::vector<int32_t>& changed) {
  Node* node = by_block_[static_cast<size_t>(block)];
  WEFT_CHECK(node != nullptr, "block {} is not known", block);
  Node* parent = node->parent;
  Detach(*node, changed);
  if (parent->parent == nullptr) DropIfEmpty(*parent);
}

void PrefixCache::DropIfEmpty(Node& root) {
  if (!root.children.empty()) return;
  roots_.erase(root.salt);
  const NodeId id = root.id;
  nodes_.erase(id);
}

void PrefixCache::Detach(Node& top, std::vector<int32_t>& changed) {
  top.parent->children.erase(&top);
  std::vector<Node*> open = {&top};
  while (!open.empty()) {
    Node* node = open.back();
    open.pop_back();
    open.insert(open.end(), node->children.begin(), node->children.end());
    if (full(*node)) {
      auto [it, end] = by_hash_.equal_range(node->hash);
      while (it != end && it->second != node) ++it;
      WEFT_CHECK(it != end);
      by_hash_.erase(it);
    }
    by_block_[static_cast<size_t>(node->block)] = nullptr;
    --size_;
    changed.push_back(node->block);
    const NodeId id = node->id;
    nodes_.erase(id);
  }
}

}  // namespace weft
