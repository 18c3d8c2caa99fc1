#pragma once
// For tests: rapidcheck's own ranges begin small and grow with the number of cases; these are full-sized from the
// first.

#include <rapidcheck.h>

namespace weft::cp {

// Any of [min, end). To be called inside a property.
template <typename T>
T InRange(T min, T end) {
  return *rc::gen::resize(rc::kNominalSize, rc::gen::inRange<T>(min, end));
}

}  // namespace weft::cp
