#pragma once
// Which blocks of the KV cache hold which tokens, so that a request finds what an earlier one with the same beginning
// has computed. An index alone: who uses a block, and which one has to go, is the business of KvManager.
//
// The blocks form trees, one for each salt: a node is a virtual block, its children are blocks that were computed
// behind it. The KV of a token depends on all tokens before it, so a block can be reused only behind the same chain of
// parents. Inner nodes are full blocks; a leaf may hold fewer tokens (the end of a sequence). A full block is found by
// a hash chained over its parents, and then compared, its parent and each of its tokens: two chains with the same hash
// are never taken for each other. Behind the last full block that matches, the block that agrees with the request for
// the longest is found among the children, which are kept in lexicographic order: it is a neighbour of the request's
// tokens there.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

namespace weft {

class PrefixCache {
 public:
  // Names a node for good: it is never used again after the node has gone. 0 names none.
  using NodeId = uint64_t;
  // Hash of `tokens` behind a chain whose hash is `parent`.
  using Hash = uint64_t (*)(uint64_t parent, std::span<const int32_t> tokens);

  struct Match {
    std::vector<int32_t> blocks;  // full blocks from the beginning on
    NodeId node = 0;              // that of the last one of them; 0 when there is none
    // The block that agrees with the tokens behind them for the longest, for `partial_tokens` tokens (> 0), or -1.
    int32_t partial_block = -1;
    int64_t partial_tokens = 0;
  };

  // `block_tokens`: of a (virtual) block.
  PrefixCache(int64_t block_tokens, int64_t num_blocks, Hash hash = &DefaultHash);

  // What is known of the beginning of `tokens`.
  Match Find(const std::string& salt, std::span<const int32_t> tokens) const;

  // Where a sequence has got to in its tree.
  struct Cursor {
    NodeId node = 0;    // of its last full block that was added
    size_t blocks = 0;  // so many were
  };

  // Makes known the blocks of a sequence: `tokens` are those whose KV is in `blocks`. Goes on from `cursor`, and sets
  // it. A block that is not full is taken in when `with_partial`. Where the same tokens are known already, the older
  // block stays. Blocks that have become known, or no longer are, are appended to `changed`.
  void Insert(const std::string& salt, std::span<const int32_t> tokens, std::span<const int32_t> blocks,
              bool with_partial, Cursor& cursor, std::vector<int32_t>& changed);

  // Forgets a block, and those behind it, which nobody could find any more. All are appended to `changed`.
  void Remove(int32_t block, std::vector<int32_t>& changed);

  bool Knows(int32_t block) const { return by_block_[static_cast<size_t>(block)] != nullptr; }
  // Blocks known.
  int64_t size() const { return size_; }

  static uint64_t DefaultHash(uint64_t parent, std::span<const int32_t> tokens);

 private:
  struct Node;
  struct TokenOrder {
    using is_transparent = void;
    bool operator()(const Node* a, const Node* b) const;
    bool operator()(const Node* a, std::span<const int32_t> b) const;
    bool operator()(std::span<const int32_t> a, const Node* b) const;
  };
  struct Node {
    NodeId id = 0;
    Node* parent = nullptr;       // null: the root of a salt
    std::string salt;             // of a root
    int32_t block = -1;           // -1: a root
    uint64_t hash = 0;            // chained; of full blocks and roots
    std::vector<int32_t> tokens;  // 1 .. block_tokens; none in a root
    std::set<Node*, TokenOrder> children;
  };

  const Node* Root(const std::string& salt) const;
  Node& RootOrNew(const std::string& salt);
  Node& Make(Node* parent, int32_t block);
  bool full(const Node& node) const { return static_cast<int64_t>(node.tokens.size()) == block_tokens_; }
  Node* FindFull(const Node& parent, uint64_t hash, std::span<const int32_t> tokens) const;
  void InsertPartial(Node& parent, std::span<const int32_t> tokens, int32_t block, std::vector<int32_t>& changed);
  void Detach(Node& node, std::vector<int32_t>& changed);
  void DropIfEmpty(Node& root);

  int64_t block_tokens_;
  Hash hash_;
  NodeId next_id_ = 1;
  int64_t size_ = 0;
  std::unordered_map<NodeId, std::unique_ptr<Node>> nodes_;
  std::unordered_map<std::string, Node*> roots_;
  std::unordered_multimap<uint64_t, Node*> by_hash_;  // full blocks
  std::vector<Node*> by_block_;
};

}  // namespace weft
