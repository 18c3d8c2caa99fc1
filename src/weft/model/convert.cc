#include "weft/model/convert.h"

#include "weft/core/error.h"

namespace weft {
namespace {

template <typename From, typename To, typename F>
void Map(const void* src, void* dst, int64_t n, F convert) {
  const auto* in = static_cast<const char*>(src);
  auto* out = static_cast<To*>(dst);
  for (int64_t i = 0; i < n; ++i) out[i] = convert(LoadUnaligned<From>(in + i * static_cast<int64_t>(sizeof(From))));
}

}  // namespace

void ConvertValues(DType from, const void* src, DType to, void* dst, int64_t n) {
  WEFT_CHECK(to == DType::kF32 || to == DType::kBF16, "to {}", NameOf(to));
  const bool f32 = to == DType::kF32;
  if (from == to) {
    if (n > 0) std::memcpy(dst, src, static_cast<size_t>(n) * SizeOf(to));
  } else if (from == DType::kBF16) {
    Map<uint16_t, float>(src, dst, n, [](uint16_t x) { return ToFloat(bf16{x}); });
  } else if (from == DType::kF32) {
    Map<float, bf16>(src, dst, n, [](float x) { return ToBf16(x); });
  } else if (from == DType::kF16 && f32) {
    Map<uint16_t, float>(src, dst, n, [](uint16_t x) { return HalfToFloatFast(x); });
  } else if (from == DType::kF16) {
    Map<uint16_t, bf16>(src, dst, n, [](uint16_t x) { return ToBf16(HalfToFloatFast(x)); });
  } else {
    WEFT_CHECK(false, "from {}", NameOf(from));
  }
}

void ConvertFp8E4m3(const uint8_t* src, float scale, DType to, void* dst, int64_t n) {
  WEFT_CHECK(to == DType::kF32 || to == DType::kBF16, "to {}", NameOf(to));
  if (to == DType::kF32) {
    Map<uint8_t, float>(src, dst, n, [scale](uint8_t x) { return Fp8E4m3ToFloat(x) * scale; });
  } else {
    Map<uint8_t, bf16>(src, dst, n, [scale](uint8_t x) { return ToBf16(Fp8E4m3ToFloat(x) * scale); });
  }
}

}  // namespace weft
