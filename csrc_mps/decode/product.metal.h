// How each lane gets its own of several sums over a simdgroup.
#pragma once
#include <metal_stdlib>
using namespace metal;

// Lanes exchange half of their N values and add, until each has one.
template <int N>
inline void share_sums(thread float* values, uint lane) {
  constexpr int HALF = N / 2;
  const bool upper = lane & HALF;
#pragma unroll
  for (int i = 0; i < HALF; i++) {
    const float low = values[i], high = values[i + HALF];
    values[i] = (upper ? high : low) + simd_shuffle_xor(upper ? low : high, ushort(HALF));
  }
  share_sums<HALF>(values, lane);
}

template <>
inline void share_sums<1>(thread float* values, uint lane) {}

// N sums over a simdgroup at once, N a power of two up to 32: lane l gets that of values[l % N]. `values` is used up.
template <int N>
inline float sum_of_each(thread float* values, uint lane) {
  share_sums<N>(values, lane);
  float sum = values[0];
#pragma unroll
  for (int distance = N; distance < 32; distance *= 2) sum += simd_shuffle_xor(sum, ushort(distance));
  return sum;
}
