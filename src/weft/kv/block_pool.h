#pragma once
// The virtual blocks of the KV cache: who may hand them out, nothing about what is in them.

#include <cstddef>
#include <cstdint>
#include <vector>

namespace weft {

// Blocks 0 .. size-1, each with a count of its users and a mark that says whether its content is worth keeping. Blocks
// without users wait in one of two queues: those without the mark are handed out first, those with it only when there
// are no others, the one that lost its last user longest ago first. All operations are O(1) a block.
class BlockPool {
 public:
  explicit BlockPool(int64_t size);

  int64_t size() const { return static_cast<int64_t>(blocks_.size()); }
  // Blocks without users, with or without the mark.
  int64_t num_free() const { return queues_[0].size + queues_[1].size; }
  int64_t num_free_kept() const { return queues_[1].size; }
  int32_t refs(int32_t block) const { return blocks_[Index(block)].refs; }
  bool kept(int32_t block) const { return blocks_[Index(block)].kept; }

  // The next block of the queues, now with one user. Needs num_free() > 0. A kept block keeps its mark: the caller sees
  // to it that nobody counts on its content any more.
  int32_t Allocate();
  // One more user. A block without users is taken out of its queue.
  void AddRef(int32_t block);
  // One user less. Without users the block goes to the end of its queue.
  void Release(int32_t block);
  // Sets or removes the mark. A block without users goes to the end of the other queue.
  void SetKept(int32_t block, bool kept);

 private:
  static constexpr int32_t kNone = -1;
  struct Block {
    int32_t refs = 0;
    bool kept = false;
    int32_t next = kNone;  // in its queue
    int32_t prev = kNone;
  };
  struct Queue {
    int32_t first = kNone;
    int32_t last = kNone;
    int64_t size = 0;
  };

  size_t Index(int32_t block) const;
  Queue& QueueOf(const Block& block) { return queues_[block.kept ? 1 : 0]; }
  void Link(int32_t block);    // to the end of its queue
  void Unlink(int32_t block);  // from anywhere in its queue

  std::vector<Block> blocks_;
  Queue queues_[2];  // unmarked, kept
};

}  // namespace weft
