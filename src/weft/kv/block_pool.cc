#include "weft/kv/block_pool.h"

#include <limits>

#include "weft/core/error.h"

namespace weft {

BlockPool::BlockPool(int64_t size) {
  WEFT_CHECK(size >= 0 && size <= std::numeric_limits<int32_t>::max(), "size = {}", size);
  const auto n = static_cast<size_t>(size);
  refs_.assign(n, 0);
  next_.assign(n, kNone);
  prev_.assign(n, kNone);
  for (size_t block = 0; block < n; ++block) Link(static_cast<int32_t>(block));
}

size_t BlockPool::Index(int32_t block) const {
  WEFT_CHECK(block >= 0 && block < size(), "block {} of {}", block, size());
  return static_cast<size_t>(block);
}

int32_t BlockPool::Allocate() {
  WEFT_CHECK(num_free_ > 0, "no free block left of {}", size());
  const int32_t block = first_;
  AddRef(block);
  return block;
}

void BlockPool::AddRef(int32_t block) {
  if (refs_[Index(block)]++ == 0) Unlink(block);
}

void BlockPool::Release(int32_t block) {
  int32_t& refs = refs_[Index(block)];
  WEFT_CHECK(refs > 0, "block {} is free already", block);
  if (--refs == 0) Link(block);
}

void BlockPool::Link(int32_t block) {
  const auto i = static_cast<size_t>(block);
  prev_[i] = last_;
  next_[i] = kNone;
  (last_ == kNone ? first_ : next_[static_cast<size_t>(last_)]) = block;
  last_ = block;
  ++num_free_;
}

void BlockPool::Unlink(int32_t block) {
  const auto i = static_cast<size_t>(block);
  (prev_[i] == kNone ? first_ : next_[static_cast<size_t>(prev_[i])]) = next_[i];
  (next_[i] == kNone ? last_ : prev_[static_cast<size_t>(next_[i])]) = prev_[i];
  --num_free_;
}

}  // namespace weft
