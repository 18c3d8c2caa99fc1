#pragma once
// The panels of the cpu table: weights of 16 output columns in the order in which the linear kernels read them.
//
// A panel holds k rounded up to even rows of 16 columns. f32: element (p, j) at p * 16 + j. bf16: 32-bit words, word
// (p / 2) * 16 + j holds column j of row p (even) in its low half and of row p + 1 in its high half. A vector of words
// becomes two vectors of floats, for one row each and the same columns, with one shift and one and; the order is the
// same for every vector length, and it is what the bf16 dot-product instructions (vdpbf16ps, bfmmla) want.

#include <cstdint>

#include "weft/kernels/table.h"

namespace weft::cpu {

constexpr int64_t kPanel = PackedWeights::kPanel;

inline int64_t EvenDepth(const PackedWeights& w) { return (w.k + 1) / 2 * 2; }
// Bytes from one panel to the next.
inline int64_t PanelBytes(const PackedWeights& w) {
  return EvenDepth(w) * kPanel * static_cast<int64_t>(SizeOf(w.dtype));
}

void PackWeights(const void* src, DType src_dtype, int64_t src_stride, int64_t row0, int64_t rows, PackedWeights& w);
void UnpackRow(const PackedWeights& w, int64_t row, float* out);

}  // namespace weft::cpu
