#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "weft/core/buffer.h"
#include "weft/core/dtype.h"
#include "weft/core/error.h"
#include "weft/core/thread_pool.h"

namespace weft {
namespace {

TEST(Dtype, Bf16RoundsToNearestEven) {
  EXPECT_EQ(ToBf16(1.0f).bits, 0x3f80);
  EXPECT_EQ(ToBf16(std::bit_cast<float>(0x3f808000u)).bits, 0x3f80);  // tie: to even, down
  EXPECT_EQ(ToBf16(std::bit_cast<float>(0x3f818000u)).bits, 0x3f82);  // tie: to even, up
  EXPECT_EQ(ToBf16(std::bit_cast<float>(0x3f808001u)).bits, 0x3f81);
  EXPECT_TRUE(std::isnan(ToFloat(ToBf16(std::bit_cast<float>(0x7f800001u)))));
  EXPECT_EQ(ToFloat(ToBf16(std::numeric_limits<float>::infinity())), std::numeric_limits<float>::infinity());
}

TEST(Dtype, EveryHalfIsExact) {
  for (uint32_t h = 0; h < 0x10000; ++h) {
    const int exponent = static_cast<int>((h >> 10) & 31);
    const double mantissa = h & 1023;
    const double sign = (h & 0x8000) ? -1 : 1;
    const float got = HalfToFloat(static_cast<uint16_t>(h));
    if (exponent == 31) {
      EXPECT_EQ(std::isnan(got), mantissa != 0);
      EXPECT_EQ(std::isinf(got), mantissa == 0);
      continue;
    }
    const double want = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    EXPECT_EQ(got, static_cast<float>(sign * want)) << h;
  }
}

TEST(Buffer, IsAlignedZeroedAndMovable) {
  for (const size_t bytes : {size_t{1}, size_t{4096}, size_t{5} << 20}) {
    Buffer buffer(bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % (bytes >= (size_t{2} << 20) ? size_t{2} << 20 : 64), 0u);
    EXPECT_EQ(buffer.as<char>()[bytes - 1], 0);
    std::memset(buffer.data(), 7, bytes);
    const Buffer moved = std::move(buffer);
    EXPECT_EQ(moved.as<char>()[bytes - 1], 7);
  }
}

TEST(ThreadPool, EveryIndexOnceOnEverySize) {
  for (const int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    for (const int64_t n : {0, 1, 7, 1000}) {
      for (const int64_t grain : {1, 3, 1000}) {
        std::vector<std::atomic<int>> hits(static_cast<size_t>(n));
        pool.ParallelFor(n, grain, [&](int64_t begin, int64_t end, int thread) {
          EXPECT_LT(thread, threads);
          for (int64_t i = begin; i < end; ++i) ++hits[static_cast<size_t>(i)];
        });
        for (auto& hit : hits) EXPECT_EQ(hit.load(), 1);
      }
    }
    std::atomic<int> ran{0};
    for (int i = 0; i < 2000; ++i) pool.RunOnAll([&](int) { ++ran; });
    EXPECT_EQ(ran.load(), 2000 * threads);
  }
}

TEST(ThreadPool, LeavesTheCallersCpusAsTheyWere) {
  const std::vector<int> before = AllowedCpus();
  {
    ThreadPool pool(2, before);
    EXPECT_EQ(AllowedCpus(), std::vector<int>{before[0]});
  }
  EXPECT_EQ(AllowedCpus(), before);
}

TEST(Error, CarriesKindAndParameter) {
  try {
    throw Error("block size 3: must be a multiple of 2", ErrorKind::kInvalidArgument, "block_size");
  } catch (const Error& e) {
    EXPECT_EQ(e.param(), "block_size");
    EXPECT_STREQ(e.what(), "block size 3: must be a multiple of 2");
  }
  EXPECT_DEATH(WEFT_CHECK(1 == 2, "x = {}", 3), "1 == 2: x = 3");
}

}  // namespace
}  // namespace weft
