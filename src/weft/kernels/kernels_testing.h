#pragma once
// What the tests of the kernels share: the tables (ref, and cpu for every SIMD target of this machine), random inputs.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iostream>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "weft/kernels/cpu/targets.h"
#include "weft/kernels/table.h"
//
#include "hwy/highway.h"

namespace weft {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr double kEps = std::numeric_limits<float>::epsilon();

struct Backend {
  std::string name;
  int64_t target = 0;  // Highway target for the cpu table, 0 for ref
};

inline std::vector<Backend> AllBackends() {
  std::vector<Backend> backends = {{"ref", 0}};
  const int64_t supported = hwy::SupportedTargets() & HWY_TARGETS;
  for (int64_t rest = supported; rest != 0; rest &= rest - 1) {
    const int64_t target = rest & -rest;
    backends.push_back({std::string("cpu_") + hwy::TargetName(target), target});
  }
  return backends;
}

// Every test runs on every backend and with one and with three threads, on inputs from a fresh seed that is printed.
class KernelTest : public testing::TestWithParam<Backend> {
 protected:
  void SetUp() override {
    if (GetParam().target != 0) {
      hwy::SetSupportedTargetsForTest(GetParam().target);
      hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    }
    const uint64_t seed = std::random_device{}();
    std::cout << "seed " << seed << "\n";
    RecordProperty("seed", std::to_string(seed));
    rng.seed(seed);
  }
  void TearDown() override {
    hwy::SetSupportedTargetsForTest(0);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }

  const KernelTable& table() const { return GetParam().target != 0 ? CpuKernels() : RefKernels(); }
  ThreadPool& pool() { return Int(0, 1) == 0 ? pool1 : pool3; }

  int64_t Int(int64_t lo, int64_t hi) { return std::uniform_int_distribution<int64_t>(lo, hi)(rng); }
  bool Coin() { return Int(0, 1) == 1; }
  template <typename T>
  T OneOf(std::initializer_list<T> values) {
    return values.begin()[Int(0, static_cast<int64_t>(values.size()) - 1)];
  }
  std::vector<float> Normal(int64_t count, float scale = 1.0f) {
    std::normal_distribution<float> distribution(0.0f, scale);
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = distribution(rng);
    return values;
  }

  std::mt19937_64 rng;
  ThreadPool pool1{1};
  ThreadPool pool3{3};
};

inline double Norm(const float* x, int64_t n, int64_t stride = 1) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i * stride]) * x[i * stride];
  return std::sqrt(sum);
}

inline std::string BackendName(const testing::TestParamInfo<Backend>& info) { return info.param.name; }

#define WEFT_FOR_ALL_BACKENDS(Suite) \
  INSTANTIATE_TEST_SUITE_P(Kernels, Suite, testing::ValuesIn(AllBackends()), BackendName)

}  // namespace weft
