#pragma once
// How a call of linear_many is cut into pieces for the threads: the plain half of linear.cc.

#include <cstdint>
#include <span>
#include <vector>

#include "weft/core/function_ref.h"
#include "weft/kernels/table.h"

namespace weft::cpu {

// Pieces a thread, so that one which was held up elsewhere does not hold up the rest.
constexpr int64_t kPiecesOfThread = 8;

// Neighbouring products of the same rows of x: one product with the columns of all, whose x is packed once.
struct LinearGroup {
  std::span<const LinearArgs> args;
  int64_t panels = 0;  // of all of them, one after another
};

// Rows [row0, row1) x panels [panel0, panel1) of a group.
struct LinearPiece {
  int64_t group = 0;
  int64_t row0 = 0;
  int64_t row1 = 0;
  int64_t panel0 = 0;
  int64_t panel1 = 0;
  double cost = 0;
};

struct LinearPlan {
  std::vector<LinearGroup> groups;
  std::vector<LinearPiece> pieces;  // the longest first
  int64_t products = 0;             // multiplications in all
};

// Fills `plan`, whose memory is reused. `most_rows(args)`: rows of x that a piece of this product has at most.
void PlanLinear(std::span<const LinearArgs> args, int threads, FunctionRef<int64_t(const LinearArgs&)> most_rows,
                LinearPlan& plan);

}  // namespace weft::cpu
