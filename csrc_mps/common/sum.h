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

// Terms made by a function of the index, one by one.
template <class Function>
struct Terms {
  static constexpr bool in_pairs = false;
  Function one;
};
template <class Function>
Terms(Function) -> Terms<Function>;

// Where add_block puts term i of a block: terms that come in pairs (pairs.h) leave the even ones in the first half.
template <class Source>
constexpr int64_t place(int64_t i, int64_t width) {
  return Source::in_pairs ? i / 2 + i % 2 * (width / 2) : i;
}

// Adds `width` terms from `first` on to `sums`.
template <int64_t width, class T, class Source>
TORCH_FUSED_INLINE void add_block(int64_t first, const Source& terms, T* sums) {
  if constexpr (Source::in_pairs) {
    T made[width];  // first all terms, then the additions: g++ vectorises both loops only when they are apart
    for (int64_t i = 0; i < width / 2; ++i) {
      const auto pair = terms.pair(first + 2 * i);
      made[i] = pair.first;
      made[width / 2 + i] = pair.second;
    }
    for (int64_t i = 0; i < width; ++i) sums[i] += made[i];
  } else {
    for (int64_t i = 0; i < width; ++i) sums[i] += terms.one(first + i);
  }
}

// Sums terms 0 .. n - 1 as `Lanes` interleaved sums of four streams each. A stream's partial sums cascade through four
// levels, so that the rounding error grows with log(n). Returns one sum a lane in `lanes`.
template <int64_t Lanes, class T, class Source>
TORCH_FUSED_INLINE void cascade_sum(int64_t vectors, const Source& terms, T* lanes) {
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
      add_block<kWidth>(group * kWidth, terms, partial);
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
  for (; group < groups; ++group) add_block<kWidth>(group * kWidth, terms, sums[0]);
  for (int64_t level = 1; level < kLevels; ++level) {
    for (int64_t i = 0; i < kWidth; ++i) sums[0][i] += sums[level][i];
  }
  for (int64_t i = 0; i < Lanes; ++i) lanes[i] = sums[0][place<Source>(i, kWidth)];
  for (int64_t vector = groups * kStreams; vector < vectors; ++vector) {
    for (int64_t i = 0; i < Lanes; ++i) lanes[i] += terms.one(vector * Lanes + i);
  }
  for (int64_t stream = 1; stream < kStreams; ++stream) {
    for (int64_t i = 0; i < Lanes; ++i) lanes[i] += sums[0][place<Source>(stream * Lanes + i, kWidth)];
  }
}

// As cascade_sum<1>, of fewer terms than fill a block of it.
template <class T, class Source>
TORCH_FUSED_INLINE T short_sum(int64_t n, const Source& terms) {
  constexpr int64_t kStreams = 4;
  T streams[kStreams] = {};
  for (int64_t i = 0; i < n / kStreams * kStreams; ++i) streams[i % kStreams] += terms.one(i);
  T sum = streams[0];
  for (int64_t i = n / kStreams * kStreams; i < n; ++i) sum += terms.one(i);
  for (int64_t stream = 1; stream < kStreams; ++stream) sum += streams[stream];
  return sum;
}

// The sum of terms 0 .. n - 1. `terms.one(i)` makes term i and, if it comes in pairs, `terms.pair(i)` terms i and i +
// 1; each is made once.
template <class T, class Source>
TORCH_FUSED_INLINE T row_sum(int64_t n, const Source& terms) {
  constexpr int64_t lanes = kSumLanes<T>;
  if (n < lanes) return short_sum<T>(n, terms);
  T partial[lanes];
  cascade_sum<lanes>(n / lanes, terms, partial);
  T sum = 0;
  for (int64_t i = n / lanes * lanes; i < n; ++i) sum += terms.one(i);
  for (int64_t i = 0; i < lanes; ++i) sum += partial[i];
  return sum;
}

}  // namespace torch_fused
