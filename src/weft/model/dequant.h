#pragma once
// ggml's block formats to f32. Block layouts: ggml-common.h of ggml (block_q4_0 ... block_q6_K); all values
// little-endian.

#include <cstdint>

namespace weft {

// Whether Dequantise reads this ggml type (numbers as in the file, see FindGgmlType): F32, F16, BF16, Q8_0, Q4_0, Q4_1,
// Q5_0, Q5_1, Q4_K, Q5_K, Q6_K.
bool CanDequantise(uint32_t ggml_type);

// `blocks` consecutive blocks at any address to block_elements floats each. The arithmetic is f32 in the order of
// ggml's own scalar code, without fused multiply-adds: results equal its bit for bit.
void Dequantise(uint32_t ggml_type, const uint8_t* src, int64_t blocks, float* dst);

}  // namespace weft
