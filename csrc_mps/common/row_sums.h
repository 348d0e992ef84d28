// Sums over a row, several at once, in whatever order vectorises best. (sum.h sums in torch's order.)
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "simd.h"

namespace torch_fused {

// Elements of a row summed at a time: few, so that the rounding errors of a sum stay small.
constexpr int64_t kRowBlock = 1024;

// Sums over n elements at once, in streams that the compiler keeps in vectors: add(i, stream, sums) adds element i to
// sums[...][stream].
constexpr int64_t kRowStreams = 32;

template <int64_t kSums, class W, class Add>
TORCH_FUSED_INLINE std::array<W, kSums> block_sums(int64_t n, const Add& add) {
  W sums[kSums][kRowStreams] = {};
  const int64_t whole = n / kRowStreams * kRowStreams;
  for (int64_t i = 0; i < whole; i += kRowStreams) {
    for (int64_t j = 0; j < kRowStreams; ++j) add(i + j, j, sums);
  }
  for (int64_t i = whole; i < n; ++i) add(i, i - whole, sums);
  std::array<W, kSums> totals;
  for (int64_t k = 0; k < kSums; ++k) {
    for (int64_t half = kRowStreams / 2; half > 0; half /= 2) {
      for (int64_t j = 0; j < half; ++j) sums[k][j] += sums[k][j + half];
    }
    totals[k] = sums[k][0];
  }
  return totals;
}

// Sums over a row, block by block.
template <int64_t kSums, class W, class Add>
TORCH_FUSED_INLINE std::array<W, kSums> row_sums(int64_t n, const Add& add) {
  std::array<W, kSums> totals{};
  for (int64_t begin = 0; begin < n; begin += kRowBlock) {
    const auto sums = block_sums<kSums, W>(std::min(n - begin, kRowBlock),
                                           [&](int64_t i, int64_t j, W(*s)[kRowStreams]) { add(begin + i, j, s); });
    for (int64_t k = 0; k < kSums; ++k) totals[k] += sums[k];
  }
  return totals;
}

}  // namespace torch_fused
