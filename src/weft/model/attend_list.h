#pragma once
// Attention of some query segments to key pieces that come part after part: each part is attended to when it is there,
// and merged into what was found before.

#include <cstdint>
#include <span>
#include <vector>

#include "weft/core/buffer.h"
#include "weft/core/thread_pool.h"
#include "weft/kernels/table.h"
#include "weft/model/forward_batch.h"

namespace weft {

class AttendList {
 public:
  // Query rows [rows, heads, k_dim] with `q_stride` between rows and their outputs [rows, heads, v_dim], contiguous; a
  // segment's row0 counts in both. `shape` has everything but the tasks. All of it must live until the last Run.
  void Begin(std::span<const QuerySegment> segments, const float* q, int64_t q_stride, float* out,
             const AttentionArgs& shape);

  // The next part has `keys` keys more for segments[index], the first one at global position `first` and the others
  // behind it: a row sees those up to its own position.
  void AddCausal(size_t index, const KvPages& pages, int64_t keys, int64_t first);
  // The same, all of them visible to every row.
  void AddVisible(size_t index, const KvPages& pages, int64_t keys) { AddCausal(index, pages, keys, -keys); }

  // Attends to what was added since the last Run. Rows that saw no key yet have out = 0.
  void Run(const KernelTable& kernels, ThreadPool& pool);

 private:
  struct Entry {
    size_t index = 0;
    KvPages pages;
    size_t visible = 0;  // offset of its visible counts
  };

  std::span<const QuerySegment> segments_;
  const float* q_ = nullptr;
  int64_t q_stride_ = 0;
  float* out_ = nullptr;
  AttentionArgs shape_;
  std::vector<char> started_;  // by segment: its rows of out_ and lse_ hold what was found before
  std::vector<Entry> entries_;
  std::vector<int32_t> visible_;
  std::vector<KvPages> pages_;
  std::vector<AttentionTask> tasks_;
  Buffer lse_, part_out_, part_lse_;
};

}  // namespace weft
