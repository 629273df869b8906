// Sizes as callers state them. An expanded array takes no memory, however large it says it is, so that nothing is known
// of a size before it is checked.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "params.h"

namespace lstm_ext {

// a * b of sizes, or the largest number there is.
constexpr int64_t saturated_product(int64_t a, int64_t b) {
  int64_t product = 0;
  return __builtin_mul_overflow(a, b, &product) ? INT64_MAX : product;
}

// The most numbers that an array of a layer may have: more than any computer holds, and so few that all that follows
// from sizes within this bound (bytes, strides, padding, shares of threads) is far below 2^63.
inline constexpr int64_t kMostNumbers = int64_t{1} << 52;

// Whether all arrays of a layer, of which x has so many rows [.., I], keep that bound.
constexpr bool are_countable(const SequenceShape& shape, int64_t rows) {
  const int64_t H4 = saturated_product(4, shape.H);
  int64_t most = std::max(rows, H4);
  for (const int64_t width : {shape.I, shape.P}) {
    most = std::max({most, saturated_product(rows, width), saturated_product(H4, width)});
  }
  return std::max(most, saturated_product(rows, H4)) <= kMostNumbers;
}

}  // namespace lstm_ext
