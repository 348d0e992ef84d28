// How a threadgroup covers one row of a GPU kernel that keeps the row in registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "rows.h"

namespace torch_fused {

constexpr int64_t kRowThreads = 512;  // no row kernel is launched with more
constexpr int64_t kMostPacks = 4;

// Packs of 16 bytes a thread, 0 for a row too long for registers.
struct RowShape {
  int64_t packs, threads;
};

// The fewest packs, from `least_packs`, with which `threads` cover a row; more threads if four packs are not enough.
// Few packs and many threads leave registers for more rows; where a row's threads wait for each other, fewer of them
// do. Each op has what was fastest on an H100.
inline RowShape row_shape(int64_t cols, int64_t element_size, int64_t least_packs = 1,
                          int64_t most_threads = kRowThreads) {
  const int64_t width = 16 / element_size, packs_in_row = (cols + width - 1) / width;
  int64_t packs = least_packs;
  while (packs < kMostPacks && packs_in_row > packs * most_threads) packs *= 2;
  const int64_t threads = (packs_in_row + packs - 1) / packs;
  if (threads > kRowThreads) return {0, kRowThreads};
  return {packs, (threads + 31) / 32 * 32};
}

inline bool all_aligned(std::initializer_list<Rows> operands) {
  return std::all_of(operands.begin(), operands.end(), [](const Rows& r) { return rows_aligned(r.tensor, r.stride); });
}

}  // namespace torch_fused
