// The largest value of a row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "convert.h"
#include "simd.h"

namespace torch_fused {

// The largest value; NaNs are passed over, since they come back in the sum.
template <class T>
TORCH_FUSED_INLINE wide_t<T> row_max(const T* x, int64_t n) {
  constexpr int64_t kLanes = 64;
  wide_t<T> lanes[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) lanes[j] = -std::numeric_limits<wide_t<T>>::infinity();
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] = widen(x[i + j]) > lanes[j] ? widen(x[i + j]) : lanes[j];
  }
  for (int64_t i = whole; i < n; ++i) lanes[0] = std::max(lanes[0], widen(x[i]));
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) lanes[j] = lanes[j + half] > lanes[j] ? lanes[j + half] : lanes[j];
  }
  return lanes[0];
}

}  // namespace torch_fused
