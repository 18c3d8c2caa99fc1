#pragma once
// Which of Highway's targets the cpu kernels are compiled for; to be included before any Highway header.
// On x86: AVX3 (AVX-512), AVX2, SSE4 and a scalar fallback. AVX3_DL adds nothing for float arithmetic, SSSE3 nothing
// over the fallback that anyone would notice. On Arm: NEON; the vectors of SVE and RVV have no size at compile time and
// cannot be the elements of an array, which is how a register tile is written here.
#define HWY_DISABLED_TARGETS \
  (HWY_SSSE3 | HWY_AVX3_DL | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV | HWY_PPC8)
