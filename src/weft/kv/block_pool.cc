#include "weft/kv/block_pool.h"

#include <limits>

#include "weft/core/error.h"

namespace weft {

BlockPool::BlockPool(int64_t size) {
  WEFT_CHECK(size >= 0 && size <= std::numeric_limits<int32_t>::max(), "size = {}", size);
  blocks_.resize(static_cast<size_t>(size));
  for (int64_t block = 0; block < size; ++block) Link(static_cast<int32_t>(block));
}

size_t BlockPool::Index(int32_t block) const {
  WEFT_CHECK(block >= 0 && block < size(), "block {} of {}", block, size());
  return static_cast<size_t>(block);
}

int32_t BlockPool::Allocate() {
  WEFT_CHECK(num_free() > 0, "no free block left of {}", size());
  const int32_t block = queues_[0].size > 0 ? queues_[0].first : queues_[1].first;
  AddRef(block);
  return block;
}

void BlockPool::AddRef(int32_t block) {
  if (blocks_[Index(block)].refs++ == 0) Unlink(block);
}

void BlockPool::Release(int32_t block) {
  int32_t& refs = blocks_[Index(block)].refs;
  WEFT_CHECK(refs > 0, "block {} is free already", block);
  if (--refs == 0) Link(block);
}

void BlockPool::SetKept(int32_t block, bool kept) {
  Block& b = blocks_[Index(block)];
  if (b.kept == kept) return;
  if (b.refs == 0) Unlink(block);
  b.kept = kept;
  if (b.refs == 0) Link(block);
}

void BlockPool::Link(int32_t block) {
  Block& b = blocks_[static_cast<size_t>(block)];
  Queue& queue = QueueOf(b);
  b.prev = queue.last;
  b.next = kNone;
  (queue.last == kNone ? queue.first : blocks_[static_cast<size_t>(queue.last)].next) = block;
  queue.last = block;
  ++queue.size;
}

void BlockPool::Unlink(int32_t block) {
  const Block& b = blocks_[static_cast<size_t>(block)];
  Queue& queue = QueueOf(b);
  (b.prev == kNone ? queue.first : blocks_[static_cast<size_t>(b.prev)].next) = b.next;
  (b.next == kNone ? queue.last : blocks_[static_cast<size_t>(b.next)].prev) = b.prev;
  --queue.size;
}

}  // namespace weft
