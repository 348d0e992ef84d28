// The sum of a row in torch's own order, so that a norm has the same bits as torch's composition of pow, mean and
// rsqrt.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace torch_fused {

// Elements in one vector of torch's sum kernel: 32 bytes on x86-64 whatever the CPU, 16 on arm64.
template <class T>
#if defined(__aarch64__)
constexpr int64_t kSumLanes = 16 / sizeof(T);
#else
constexpr int64_t kSumLanes = 32 / sizeof(T);
#endif

// Sums term(0) .. term(n - 1) as `Lanes` interleaved sums of four streams each. A stream's partial sums cascade through
// four levels, so that the rounding error grows with log(n). Returns one sum a lane in `lanes`.
template <int64_t Lanes, class T, class Term>
TORCH_FUSED_INLINE void cascade_sum(int64_t vectors, const Term& term, T* lanes) {
  constexpr int64_t kStreams = 4, kLevels = 4, kWidth = kStreams * Lanes;
  const int64_t groups = vectors / kStreams;
  int64_t log2_groups = 0;
  while ((int64_t{1} << log2_groups) < groups) ++log2_groups;
  const int64_t power = std::max<int64_t>(4, log2_groups / kLevels);
  const int64_t block = int64_t{1} << power;
  T sums[kLevels][kWidth] = {};
  int64_t group = 0;
  while (group + block <= groups) {
    T partial[kWidth] = {};
    for (const int64_t end = group + block; group < end; ++group) {
      for (int64_t i = 0; i < kWidth; ++i) partial[i] += term(group * kWidth + i);
    }
    for (int64_t i = 0; i < kWidth; ++i) sums[0][i] += partial[i];
    for (int64_t level = 1; level < kLevels; ++level) {
      for (int64_t i = 0; i < kWidth; ++i) {
        sums[level][i] += sums[level - 1][i];
        sums[level - 1][i] = 0;
      }
      if (group & ((block - 1) << (level * power))) break;
    }
  }
  for (; group < groups; ++group) {
    for (int64_t i = 0; i < kWidth; ++i) sums[0][i] += term(group * kWidth + i);
  }
  for (int64_t level = 1; level < kLevels; ++level) {
    for (int64_t i = 0; i < kWidth; ++i) sums[0][i] += sums[level][i];
  }
  for (int64_t i = 0; i < Lanes; ++i) lanes[i] = sums[0][i];
  for (int64_t vector = groups * kStreams; vector < vectors; ++vector) {
    for (int64_t i = 0; i < Lanes; ++i) lanes[i] += term(vector * Lanes + i);
  }
  for (int64_t stream = 1; stream < kStreams; ++stream) {
    for (int64_t i = 0; i < Lanes; ++i) lanes[i] += sums[0][stream * Lanes + i];
  }
}

template <class T, class Term>
TORCH_FUSED_INLINE T row_sum(int64_t n, const Term& term) {
  constexpr int64_t lanes = kSumLanes<T>;
  if (n < lanes) {
    T sum;
    cascade_sum<1>(n, term, &sum);
    return sum;
  }
  T partial[lanes];
  cascade_sum<lanes>(n / lanes, term, partial);
  T sum = 0;
  for (int64_t i = n / lanes * lanes; i < n; ++i) sum += term(i);
  for (int64_t i = 0; i < lanes; ++i) sum += partial[i];
  return sum;
}

}  // namespace torch_fused
