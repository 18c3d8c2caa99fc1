#pragma once
// Element types and the scalar conversions between them.

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace weft {

enum class DType : uint8_t { kF32, kBF16, kF16, kI64, kI32, kI8, kU8 };

constexpr size_t SizeOf(DType dtype) {
  switch (dtype) {
    case DType::kI64:
      return 8;
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kBF16:
    case DType::kF16:
      return 2;
    case DType::kI8:
    case DType::kU8:
      return 1;
  }
  return 0;
}

// "float32", "bfloat16", ... as the flags and the logs spell it.
std::string_view NameOf(DType dtype);

// bfloat16 as stored: the upper half of an IEEE float32.
struct bf16 {
  uint16_t bits;
};

constexpr float ToFloat(bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

// Rounds to nearest even; a NaN stays a (quiet) NaN.
constexpr bf16 ToBf16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<uint16_t>((u >> 16) | 0x40u)};
  return bf16{static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

// IEEE half to float, all values including subnormals, infinities and NaN.
float HalfToFloat(uint16_t half);

}  // namespace weft
