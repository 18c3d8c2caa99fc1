#include "weft/model/tensor_parallel.h"

#include <vector>

#include "weft/model/weights.h"

namespace weft {
namespace {

// Up to this many rows every rank adds up all partial results by itself (one barrier); above, each adds up a share of
// the rows and the shares are gathered (two barriers, 1/TP of the additions).
constexpr int64_t kDirectReduceRows = 16;

}  // namespace

float* TensorParallel::Partial(int64_t rows) {
  partial_[turn_].Reserve(static_cast<size_t>(rows * hidden_) * sizeof(float));
  return partial_[turn_].as<float>();
}

void TensorParallel::AddReduced(float* x, int64_t rows, ThreadPool& pool) {
  const auto row_bytes = static_cast<size_t>(hidden_) * sizeof(float);
  const auto bytes_of = [&](const float* data, int64_t n) {
    return std::as_bytes(std::span<const float>(data, static_cast<size_t>(n * hidden_)));
  };
  std::vector<std::span<const float>> parts;
  const auto members = static_cast<size_t>(group_.size());
  std::vector<size_t> sizes(members, static_cast<size_t>(rows) * row_bytes);
  group_.StartAllGather(bytes_of(partial_[turn_].as<float>(), rows), sizes);
  group_.FinishAllGather(parts);

  // Always in the order of the ranks, so that all of them get the same sum to the last bit.
  const bool direct = rows <= kDirectReduceRows;
  const Range mine = direct ? Range{0, rows} : SplitRange(rows, group_.size(), group_.rank());
  std::vector<const float*> sources;
  for (const auto& part : parts) sources.push_back(part.data() + mine.begin * hidden_);
  Buffer& reduced = reduced_[turn_];
  reduced.Reserve(static_cast<size_t>(mine.size()) * row_bytes);
  k_.sum_parts(sources, mine.size() * hidden_, reduced.as<float>(), pool);
  if (direct) {
    k_.add(x, hidden_, reduced.as<float>(), hidden_, rows, hidden_, pool);
  } else {
    for (size_t i = 0; i < members; ++i) {
      sizes[i] = static_cast<size_t>(SplitRange(rows, group_.size(), static_cast<int64_t>(i)).size()) * row_bytes;
    }
    std::vector<std::span<const float>> sums;
    group_.StartAllGather(bytes_of(reduced.as<float>(), mine.size()), sizes);
    group_.FinishAllGather(sums);
    for (size_t i = 0; i < members; ++i) {
      const Range share = SplitRange(rows, group_.size(), static_cast<int64_t>(i));
      k_.add(x + share.begin * hidden_, hidden_, sums[i].data(), hidden_, share.size(), hidden_, pool);
    }
  }
  turn_ ^= 1;
}

}  // namespace weft
