// Compiled without contraction into fused multiply-adds (CMakeLists.txt): d * q + m must round twice.
#include "weft/model/dequant.h"

#include "weft/core/error.h"
#include "weft/model/convert.h"

namespace weft {
namespace {

float Half(const uint8_t* at) { return HalfToFloatFast(LoadUnaligned<uint16_t>(at)); }

// The formats of 32 values: a scale d, for the _1 ones a minimum m, for Q5 the fifth bits, then the low four bits of
// values 0..15 in the low nibbles and of 16..31 in the high ones.

void BlockQ4_0(const uint8_t* block, float* out) {
  const float d = Half(block);
  const uint8_t* qs = block + 2;
  for (int i = 0; i < 16; ++i) {
    out[i] = static_cast<float>((qs[i] & 15) - 8) * d;
    out[i + 16] = static_cast<float>((qs[i] >> 4) - 8) * d;
  }
}

void BlockQ4_1(const uint8_t* block, float* out) {
  const float d = Half(block);
  const float m = Half(block + 2);
  const uint8_t* qs = block + 4;
  for (int i = 0; i < 16; ++i) {
    out[i] = static_cast<float>(qs[i] & 15) * d + m;
    out[i + 16] = static_cast<float>(qs[i] >> 4) * d + m;
  }
}

// Value i of a Q5 block, 0 to 31.
void Fifths(const uint8_t* qh, const uint8_t* qs, int* q) {
  const auto high = LoadUnaligned<uint32_t>(qh);
  for (int i = 0; i < 16; ++i) {
    q[i] = static_cast<int>((qs[i] & 15u) | ((high >> i) & 1u) << 4);
    q[i + 16] = static_cast<int>((qs[i] >> 4) | ((high >> (i + 16)) & 1u) << 4);
  }
}

void BlockQ5_0(const uint8_t* block, float* out) {
  const float d = Half(block);
  int q[32];
  Fifths(block + 2, block + 6, q);
  for (int i = 0; i < 32; ++i) out[i] = static_cast<float>(q[i] - 16) * d;
}

void BlockQ5_1(const uint8_t* block, float* out) {
  const float d = Half(block);
  const float m = Half(block + 2);
  int q[32];
  Fifths(block + 4, block + 8, q);
  for (int i = 0; i < 32; ++i) out[i] = static_cast<float>(q[i]) * d + m;
}

void BlockQ8_0(const uint8_t* block, float* out) {
  const float d = Half(block);
  for (int i = 0; i < 32; ++i) out[i] = static_cast<float>(static_cast<int8_t>(block[2 + i])) * d;
}

// The formats of 256 values in 8 sub-blocks of 32 (Q4_K, Q5_K): sub-block s has a 6-bit scale and a 6-bit minimum in 12
// bytes. Those of 0..3 are the low six bits of bytes 0..3 and 4..7; those of 4..7 have their low four bits in the
// nibbles of bytes 8..11 and their high two in the top bits of the former.
struct ScaleMin {
  float d, m;
};
ScaleMin SubBlock(const uint8_t* scales, int s, float d, float dmin) {
  int scale, min;
  if (s < 4) {
    scale = scales[s] & 63;
    min = scales[s + 4] & 63;
  } else {
    scale = (scales[s + 4] & 15) | (scales[s - 4] >> 6) << 4;
    min = (scales[s + 4] >> 4) | (scales[s] >> 6) << 4;
  }
  return {d * static_cast<float>(scale), dmin * static_cast<float>(min)};
}

// d, dmin, scales[12], [qh[32],] qs[128]. Bytes 32 p .. 32 p + 31 of qs hold sub-block 2 p in their low nibbles and
// 2 p + 1 in their high ones; the fifth bit of value i of sub-block s is bit s of qh[i].
template <bool kFifthBit>
void BlockQ45K(const uint8_t* block, float* out) {
  const float d = Half(block);
  const float dmin = Half(block + 2);
  const uint8_t* scales = block + 4;
  const uint8_t* qh = block + 16;
  const uint8_t* qs = block + (kFifthBit ? 48 : 16);
  for (int s = 0; s < 8; ++s) {
    const ScaleMin sub = SubBlock(scales, s, d, dmin);
    const uint8_t* q = qs + 32 * (s / 2);
    const int shift = 4 * (s % 2);
    for (int i = 0; i < 32; ++i) {
      int value = (q[i] >> shift) & 15;
      if constexpr (kFifthBit) value |= ((qh[i] >> s) & 1) << 4;
      out[32 * s + i] = sub.d * static_cast<float>(value) - sub.m;
    }
  }
}

// ql[128], qh[64], scales int8[16], d: 16 sub-blocks of 16. Of each half (128 values; 64 bytes of ql, 32 of qh), the
// value 32 g + i has its low bits in nibble g / 2 of ql[32 (g % 2) + i] and its high two in bits 2 g of qh[i].
void BlockQ6K(const uint8_t* block, float* out) {
  const uint8_t* scales = block + 192;
  const float d = Half(block + 208);
  for (int half = 0; half < 2; ++half) {
    const uint8_t* ql = block + 64 * half;
    const uint8_t* qh = block + 128 + 32 * half;
    for (int g = 0; g < 4; ++g) {
      for (int i = 0; i < 32; ++i) {
        const int low = (ql[32 * (g % 2) + i] >> (4 * (g / 2))) & 15;
        const int high = (qh[i] >> (2 * g)) & 3;
        const auto scale = static_cast<float>(static_cast<int8_t>(scales[8 * half + 2 * g + i / 16]));
        out[128 * half + 32 * g + i] = d * scale * static_cast<float>((low | high << 4) - 32);
      }
    }
  }
}

struct Format {
  uint32_t type;
  int64_t elements, bytes;
  void (*block)(const uint8_t*, float*);
};
constexpr Format kFormats[] = {
    {2, 32, 18, BlockQ4_0}, {3, 32, 20, BlockQ4_1},           {6, 32, 22, BlockQ5_0},          {7, 32, 24, BlockQ5_1},
    {8, 32, 34, BlockQ8_0}, {12, 256, 144, BlockQ45K<false>}, {13, 256, 176, BlockQ45K<true>}, {14, 256, 210, BlockQ6K},
};
constexpr uint32_t kF32 = 0, kF16 = 1, kBF16 = 30;

const Format* FindFormat(uint32_t type) {
  for (const Format& format : kFormats) {
    if (format.type == type) return &format;
  }
  return nullptr;
}

}  // namespace

bool CanDequantise(uint32_t type) {
  return type == kF32 || type == kF16 || type == kBF16 || FindFormat(type) != nullptr;
}

void Dequantise(uint32_t type, const uint8_t* src, int64_t blocks, float* dst) {
  if (const Format* format = FindFormat(type)) {
    for (int64_t i = 0; i < blocks; ++i) format->block(src + i * format->bytes, dst + i * format->elements);
    return;
  }
  WEFT_CHECK(CanDequantise(type), "ggml type {}", type);
  ConvertValues(type == kF32 ? DType::kF32 : type == kF16 ? DType::kF16 : DType::kBF16, src, DType::kF32, dst, blocks);
}

}  // namespace weft
