#include "weft/model/attend_list.h"

#include <algorithm>

namespace weft {

void AttendList::Begin(std::span<const QuerySegment> segments, const float* q, int64_t q_stride, float* out,
                       const AttentionArgs& shape) {
  segments_ = segments;
  q_ = q;
  q_stride_ = q_stride;
  out_ = out;
  shape_ = shape;
  started_.assign(segments.size(), 0);
  entries_.clear();
  visible_.clear();
  int64_t rows = 0;
  for (const QuerySegment& segment : segments) rows = std::max(rows, segment.row0 + segment.rows);
  const int64_t heads = shape.q_heads;
  lse_.Reserve(static_cast<size_t>(rows * heads) * sizeof(float));
}

void AttendList::AddCausal(size_t index, const KvPages& pages, int64_t keys, int64_t first) {
  const QuerySegment& segment = segments_[index];
  if (keys == 0 || first >= segment.first_position + segment.rows) return;
  entries_.push_back({index, pages, visible_.size()});
  for (int64_t i = 0; i < segment.rows; ++i) {
    visible_.push_back(static_cast<int32_t>(std::clamp<int64_t>(segment.first_position + i + 1 - first, 0, keys)));
  }
}

void AttendList::Run(const KernelTable& kernels, ThreadPool& pool) {
  std::stable_sort(entries_.begin(), entries_.end(), [](const Entry& a, const Entry& b) { return a.index < b.index; });
  pages_.clear();
  for (const Entry& entry : entries_) {
    pages_.push_back(entry.pages);
    pages_.back().visible = visible_.data() + entry.visible;
  }
  const int64_t heads = shape_.q_heads;
  const int64_t out_dim = heads * shape_.v_dim;
  auto* lse = lse_.as<float>();
  const bool merges =
      std::any_of(entries_.begin(), entries_.end(), [&](const Entry& e) { return started_[e.index] != 0; });
  if (merges) {
    int64_t rows = 0;
    for (const QuerySegment& segment : segments_) rows = std::max(rows, segment.row0 + segment.rows);
    part_out_.Reserve(static_cast<size_t>(rows * out_dim) * sizeof(float));
    part_lse_.Reserve(static_cast<size_t>(rows * heads) * sizeof(float));
  }
  tasks_.clear();
  std::vector<size_t> merged;  // segments whose part has to be merged
  for (size_t begin = 0; begin < entries_.size();) {
    const size_t index = entries_[begin].index;
    size_t end = begin;
    while (end < entries_.size() && entries_[end].index == index) ++end;
    const QuerySegment& segment = segments_[index];
    const bool more = started_[index] != 0;
    float* to = more ? part_out_.as<float>() : out_;
    float* to_lse = more ? part_lse_.as<float>() : lse;
    tasks_.push_back({.q = q_ + segment.row0 * q_stride_,
                      .q_stride = q_stride_,
                      .out = to + segment.row0 * out_dim,
                      .out_stride = out_dim,
                      .lse = to_lse + segment.row0 * heads,
                      .lse_stride = heads,
                      .rows = segment.rows,
                      .kv = std::span<const KvPages>(pages_).subspan(begin, end - begin)});
    if (more) merged.push_back(index);
    started_[index] = 1;
    begin = end;
  }
  if (!tasks_.empty()) {
    AttentionArgs args = shape_;
    args.tasks = tasks_;
    kernels.attention(args, pool);
  }
  for (const size_t index : merged) {
    const QuerySegment& segment = segments_[index];
    // In place: the first part is read where the sum is written, element by element.
    float* out = out_ + segment.row0 * out_dim;
    float* out_lse = lse + segment.row0 * heads;
    const float* outs[] = {out, part_out_.as<float>() + segment.row0 * out_dim};
    const float* lses[] = {out_lse, part_lse_.as<float>() + segment.row0 * heads};
    kernels.merge({.out = outs,
                   .lse = lses,
                   .rows = segment.rows,
                   .heads = heads,
                   .dim = shape_.v_dim,
                   .out_row_stride = out_dim,
                   .lse_row_stride = heads,
                   .merged = out,
                   .merged_row_stride = out_dim,
                   .merged_lse = out_lse},
                  pool);
  }
  entries_.clear();
  visible_.clear();
}

}  // namespace weft
