#pragma once
// The virtual blocks of the KV cache: who may hand them out, nothing about what is in them.

#include <cstddef>
#include <cstdint>
#include <vector>

namespace weft {

// Blocks 0 .. size-1, each with a count of its users; those without users form a queue. All operations are O(1) a
// block. Blocks are taken from the front of the queue and come back at its end, so that what a block holds stays intact
// for as long as possible after its last user has left: a cache of prefixes can still revive it.
class BlockPool {
 public:
  explicit BlockPool(int64_t size);

  int64_t size() const { return static_cast<int64_t>(refs_.size()); }
  int64_t num_free() const { return num_free_; }
  int32_t refs(int32_t block) const { return refs_[Index(block)]; }

  // The block that has been free longest, now with one user. Needs num_free() > 0.
  int32_t Allocate();
  // One more user. A free block is taken out of the queue.
  void AddRef(int32_t block);
  // One user less. Without users the block goes to the end of the queue.
  void Release(int32_t block);

 private:
  static constexpr int32_t kNone = -1;

  size_t Index(int32_t block) const;
  void Link(int32_t block);    // to the end of the queue
  void Unlink(int32_t block);  // from anywhere in the queue

  std::vector<int32_t> refs_;
  // The queue, doubly linked through the blocks themselves.
  std::vector<int32_t> next_;
  std::vector<int32_t> prev_;
  int32_t first_ = kNone;
  int32_t last_ = kNone;
  int64_t num_free_ = 0;
};

}  // namespace weft
