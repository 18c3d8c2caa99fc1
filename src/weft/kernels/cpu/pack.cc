#include "weft/kernels/cpu/pack.h"

#include <algorithm>

#include "weft/core/error.h"

namespace weft::cpu {
namespace {

inline bf16 Narrow(bf16 x) { return x; }
inline bf16 Narrow(float x) { return ToBf16(x); }
inline float Widen(bf16 x) { return ToFloat(x); }
inline float Widen(float x) { return x; }

// Columns of the source are packed in pieces, so that the 16 source rows of a piece and its packed form stay in L1.
constexpr int64_t kPiece = 256;

template <typename T>
void PackPanel(const T* src, int64_t src_stride, int64_t rows, const PackedWeights& w, int64_t panel) {
  char* to = w.data.as<char>() + panel * PanelBytes(w);
  for (int64_t p0 = 0; p0 < w.k; p0 += kPiece) {
    const int64_t p1 = std::min(p0 + kPiece, w.k);
    for (int64_t j = 0; j < rows; ++j) {
      const T* row = src + j * src_stride;
      if (w.dtype == DType::kF32) {
        float* column = reinterpret_cast<float*>(to) + j;
        for (int64_t p = p0; p < p1; ++p) column[p * kPanel] = Widen(row[p]);
        continue;
      }
      uint32_t* column = reinterpret_cast<uint32_t*>(to) + j;
      int64_t p = p0;
      for (; p + 2 <= p1; p += 2) {
        column[p / 2 * kPanel] = Narrow(row[p]).bits | static_cast<uint32_t>(Narrow(row[p + 1]).bits) << 16;
      }
      if (p < p1) column[p / 2 * kPanel] = Narrow(row[p]).bits;  // k is odd: the last half stays 0
    }
  }
}

}  // namespace

void PackWeights(const void* src, DType src_dtype, int64_t src_stride, int64_t row0, int64_t rows, PackedWeights& w) {
  WEFT_CHECK(src_dtype == DType::kF32 || src_dtype == DType::kBF16);
  WEFT_CHECK(w.dtype == DType::kF32 || w.dtype == DType::kBF16);
  WEFT_CHECK(row0 % kPanel == 0 && row0 + rows <= w.n, "rows {} + {} of {}", row0, rows, w.n);
  w.data.Reserve(static_cast<size_t>((w.n + kPanel - 1) / kPanel * PanelBytes(w)));
  for (int64_t row = 0; row < rows; row += kPanel) {
    const int64_t count = std::min(kPanel, rows - row);
    const int64_t panel = (row0 + row) / kPanel;
    if (src_dtype == DType::kF32) {
      PackPanel(static_cast<const float*>(src) + row * src_stride, src_stride, count, w, panel);
    } else {
      PackPanel(static_cast<const bf16*>(src) + row * src_stride, src_stride, count, w, panel);
    }
  }
}

void UnpackRow(const PackedWeights& w, int64_t row, float* out) {
  const char* panel = w.data.as<const char>() + row / kPanel * PanelBytes(w);
  const int64_t j = row % kPanel;
  if (w.dtype == DType::kF32) {
    for (int64_t p = 0; p < w.k; ++p) out[p] = reinterpret_cast<const float*>(panel)[p * kPanel + j];
    return;
  }
  const uint32_t* words = reinterpret_cast<const uint32_t*>(panel) + j;
  for (int64_t p = 0; p < w.k; ++p) {
    out[p] = ToFloat(bf16{static_cast<uint16_t>(words[p / 2 * kPanel] >> (p % 2 * 16))});
  }
}

}  // namespace weft::cpu
