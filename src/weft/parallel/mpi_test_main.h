#pragma once
// The main() of tests that mpirun starts in several processes: all run the same tests together, and fail together.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <span>

#include "weft/core/log.h"
#include "weft/parallel/processes.h"

namespace weft::testing {

// All processes of the test, from MpiTestMain on.
inline std::shared_ptr<Processes> everybody;

// What process 0 gives, the same in all.
inline uint64_t CommonSeed(uint64_t mine) {
  const auto all = everybody->AllGather(std::as_bytes(std::span(&mine, 1)));
  uint64_t seed = 0;
  std::memcpy(&seed, all[0].data(), sizeof(seed));
  return seed;
}

// Whether it holds in any of them.
inline bool AnyProcess(bool mine) {
  const auto all = everybody->AllGather(std::as_bytes(std::span(&mine, 1)));
  return std::ranges::any_of(all, [](const auto& one) { return one[0] != std::byte{0}; });
}

inline int MpiTestMain(int argc, char** argv) {
  // A failure is to be seen among what is printed, not hundreds of warnings that mpirun was started without ULFM.
  InitLogging("error");
  everybody = Processes::Join();
  if (everybody->size() < 2) {
    std::fprintf(stderr, "to be run by mpirun with 2 processes at least\n");
    return 1;
  }
  ::testing::InitGoogleTest(&argc, argv);
  // What leaves a test by an exception leaves messages under way, and the memory they go to is no more: the end.
  GTEST_FLAG_SET(catch_exceptions, false);
  // One process speaks; the others say what failed.
  if (everybody->rank() != 0) {
    auto& listeners = ::testing::UnitTest::GetInstance()->listeners();
    delete listeners.Release(listeners.default_result_printer());
  }
  const bool failed = RUN_ALL_TESTS() != 0;
  const bool any = AnyProcess(failed);
  if (failed) std::fprintf(stderr, "process %d: tests failed\n", everybody->rank());
  everybody.reset();
  Processes::Finish();
  return any ? 1 : 0;
}

}  // namespace weft::testing
