// Rows of memory asked for before their turn. A row that is read several times is read from memory in a burst, and
// while its results are written nothing else is under way, unless the next row already is.
#pragma once

#include <cstdint>

#include "simd.h"

namespace torch_fused {

// Elements that are computed between two calls of prefetch: few lines at a time, or they queue up before the loads.
constexpr int64_t kPrefetchRun = 64;

template <class T>
TORCH_FUSED_INLINE void prefetch(const T* from, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(T);
  constexpr int kReading = 0, kSecondLevel = 2;
  for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(from + i, kReading, kSecondLevel);
}

}  // namespace torch_fused
