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
  const auto members = static_cast<size_t>(group_.size());
  const float* own = partial_[turn_].as<float>();
  const bool direct = rows <= kDirectReduceRows;
  const auto share_of = [&](size_t i) {
    return direct ? Range{0, rows} : SplitRange(rows, group_.size(), static_cast<int64_t>(i));
  };
  const Range mine = share_of(static_cast<size_t>(group_.rank()));
  std::vector<size_t> sizes(members, static_cast<size_t>(rows) * row_bytes);

  // Always in the order of the ranks, so that all of them get the same sum to the last bit.
  std::vector<const float*> sources;
  if (direct || group_.shares_memory()) {
    std::vector<std::span<const float>> parts;
    group_.StartAllGather(bytes_of(own, rows), sizes);
    group_.FinishAllGather(parts);
    for (const auto& part : parts) sources.push_back(part.data() + mine.begin * hidden_);
  } else {
    // To each member its share alone.
    std::vector<std::span<const std::byte>> sent, parts;
    for (size_t i = 0; i < members; ++i) {
      sent.push_back(bytes_of(own + share_of(i).begin * hidden_, share_of(i).size()));
    }
    group_.AllToAll(sent, parts);
    for (const auto& part : parts) sources.push_back(reinterpret_cast<const float*>(part.data()));
  }
  Buffer& reduced = reduced_[turn_];
  reduced.Reserve(static_cast<size_t>(mine.size()) * row_bytes);
  k_.sum_parts(sources, mine.size() * hidden_, reduced.as<float>(), pool);
  if (direct) {
    k_.add(x, hidden_, reduced.as<float>(), hidden_, rows, hidden_, pool);
  } else {
    for (size_t i = 0; i < members; ++i) sizes[i] = static_cast<size_t>(share_of(i).size()) * row_bytes;
    std::vector<std::span<const float>> sums;
    group_.StartAllGather(bytes_of(reduced.as<float>(), mine.size()), sizes);
    group_.FinishAllGather(sums);
    for (size_t i = 0; i < members; ++i) {
      const Range share = share_of(i);
      k_.add(x + share.begin * hidden_, hidden_, sums[i].data(), hidden_, share.size(), hidden_, pool);
    }
  }
  turn_ ^= 1;
}

}  // namespace weft
