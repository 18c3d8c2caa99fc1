#pragma once
// Which of Highway's targets the cpu kernels are compiled for; to be included before any Highway header.
// On x86: AVX3 (AVX-512), AVX2, SSE4 and a scalar fallback. AVX3_DL adds nothing for float arithmetic, SSSE3 nothing
// over the fallback that anyone would notice. On Arm: NEON; the vectors of SVE and RVV have no size at compile time and
// cannot be the elements of an array, which is how a register tile is written here.
// Sanitizer builds do with AVX2 and the fallback: instrumented, each further target takes minutes to compile, and it is
// the same source.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define WEFT_SKIPPED_TARGETS (HWY_AVX3 | HWY_SSE4)
#else
#define WEFT_SKIPPED_TARGETS 0
#endif
#define HWY_DISABLED_TARGETS                                                                        \
  (HWY_SSSE3 | HWY_AVX3_DL | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV | HWY_PPC8 | \
   WEFT_SKIPPED_TARGETS)
