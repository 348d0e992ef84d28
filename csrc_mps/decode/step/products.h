// Products of matrix rows with a few vectors. A row is read once from start to end: one sequential stream per thread is
// the fastest way to read memory.
#pragma once

#include <cstdint>

#include "../../common/convert.h"
#include "lanes.h"

namespace torch_fused::TORCH_FUSED_TARGET {

// Vectors of floats, `stride` floats apart.
struct Vectors {
  const float* data;
  int64_t stride;
};

// Registers of sums that are in flight, so that none waits for the one before it.
constexpr int kInFlight = 64 / kLanes;

// Products of `row` with C vectors from `first` on.
template <int C, class T>
TORCH_FUSED_INLINE void row_products(const T* __restrict row, int64_t n, Vectors x, int64_t first, float* results) {
  constexpr int kSums = kInFlight / C;
  Lanes sums[C][kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kLanes <= n; i += kSums * kLanes) {
#pragma GCC unroll 8
    for (int s = 0; s < kSums; ++s) {
      Lanes weights, values;
      load(row + i + s * kLanes, weights);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        load(x.data + (first + c) * x.stride + i + s * kLanes, values);
        sums[c][s] += weights * values;
      }
    }
  }
  for (; i + kLanes <= n; i += kLanes) {
    Lanes weights, values;
    load(row + i, weights);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      load(x.data + (first + c) * x.stride + i, values);
      sums[c][0] += weights * values;
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
    Lanes sum = sums[c][0];
#pragma GCC unroll 8
    for (int s = 1; s < kSums; ++s) sum += sums[c][s];
    float result = sum_of(sum);
    const float* values = x.data + (first + c) * x.stride;
    for (int64_t j = i; j < n; ++j) result += widen(row[j]) * values[j];
    results[c] = result;
  }
}

// Products of `row` with `count` vectors; after the first few the row comes from the nearest cache.
template <class T>
TORCH_FUSED_INLINE void row_products(const T* row, int64_t n, Vectors x, int64_t count, float* results) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) row_products<4>(row, n, x, i, results + i);
  switch (count - i) {
    case 3:
      return row_products<3>(row, n, x, i, results + i);
    case 2:
      return row_products<2>(row, n, x, i, results + i);
    case 1:
      return row_products<1>(row, n, x, i, results + i);
  }
}

}  // namespace torch_fused::TORCH_FUSED_TARGET
