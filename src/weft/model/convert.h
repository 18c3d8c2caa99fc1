#pragma once
// Whole rows of stored values to f32 or bf16.

#include <bit>
#include <cstdint>
#include <cstring>

#include "weft/core/dtype.h"

namespace weft {

// IEEE half to float without a branch or a table, so that loops over it vectorise. Any value, subnormals and
// infinities included; only integer steps and one conversion that is exact, so flush-to-zero modes change nothing.
inline float HalfToFloatFast(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + (112u << 23);  // the exponent's bias: 15 -> 127
  const uint32_t special = (magnitude << 13) | 0x7f800000u;  // infinity, NaN
  const uint32_t subnormal =                                 // mantissa * 2^-24
      std::bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t bits = magnitude >= 0x7c00u ? special : magnitude < 0x400u ? subnormal : normal;
  return std::bit_cast<float>(sign | bits);
}

// OCP FP8 E4M3 (1 sign, 4 exponent, 3 mantissa bits; bias 7, no infinities, 0x7f and 0xff are NaN), as above.
inline float Fp8E4m3ToFloat(uint8_t fp8) {
  const uint32_t sign = static_cast<uint32_t>(fp8 & 0x80u) << 24;
  const uint32_t magnitude = fp8 & 0x7fu;
  const uint32_t normal = (magnitude << 20) + (120u << 23);  // the exponent's bias: 7 -> 127
  const uint32_t subnormal =                                 // mantissa * 2^-9
      std::bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-9f);
  const uint32_t bits = magnitude == 0x7fu ? 0x7fc00000u : magnitude < 8u ? subnormal : normal;
  return std::bit_cast<float>(sign | bits);
}

// A little-endian value at any address.
template <typename T>
T LoadUnaligned(const void* from) {
  static_assert(std::endian::native == std::endian::little, "the formats are little-endian");
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

// n stored values of type `from` (kF32, kBF16, kF16) at any address to `to` (kF32 or kBF16; rounded to nearest even).
void ConvertValues(DType from, const void* src, DType to, void* dst, int64_t n);

// n values of FP8 E4M3 times `scale` (the product in f32) to `to` (kF32 or kBF16; rounded to nearest even).
void ConvertFp8E4m3(const uint8_t* src, float scale, DType to, void* dst, int64_t n);

}  // namespace weft
