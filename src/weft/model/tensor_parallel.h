#pragma once
// The sums over a tensor-parallel group: every rank has a part of each row, all of them need the whole.

#include <cstdint>

#include "weft/core/buffer.h"
#include "weft/core/thread_pool.h"
#include "weft/kernels/table.h"
#include "weft/parallel/communicator.h"

namespace weft {

class TensorParallel {
 public:
  TensorParallel(Communicator& group, const KernelTable& kernels, int64_t hidden)
      : group_(group), k_(kernels), hidden_(hidden) {}

  bool split() const { return group_.size() > 1; }
  Communicator& group() const { return group_; }

  // Where this rank puts its part of the next sum, [rows, hidden].
  float* Partial(int64_t rows);
  // x [rows, hidden] += the sum of what all members have put into Partial(rows). Collective.
  void AddReduced(float* x, int64_t rows, ThreadPool& pool);

 private:
  Communicator& group_;
  const KernelTable& k_;
  int64_t hidden_;
  // What peers read lies in one of two buffers by turns: when a rank comes to use the first one again, every peer has
  // entered the collective in between and is done with it.
  Buffer partial_[2], reduced_[2];
  int turn_ = 0;
};

}  // namespace weft
