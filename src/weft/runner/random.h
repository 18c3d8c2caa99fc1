#pragma once
// Counter-based random numbers: the n-th draw of a seed is a function of (seed, n). So a request's tokens depend on its
// seed alone, whatever shares its batch, on whichever rank its row is sampled, and after a preemption.

#include <cstdint>

namespace weft {

// The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection that scatters every bit.
constexpr uint64_t MixBits(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Uniform in [0, 1), 53 bits.
constexpr double UniformAt(uint64_t seed, uint64_t n) {
  return static_cast<double>(MixBits(MixBits(seed) + n) >> 11) * 0x1p-53;
}

}  // namespace weft
