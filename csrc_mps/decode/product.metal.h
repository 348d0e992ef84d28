// What the products of the decode step share: how the rows of a matrix are read, and how each lane gets its own result.
#pragma once
#include <metal_stdlib>
#include "decode/vectors.metal.h"
using namespace metal;
using namespace torch_fused;

// R rows of a matrix, and what a lane has loaded of U blocks of their columns.
template <typename T, int R, int U>
struct Rows {
  device const T* at[R];
  Pack<T, kLaneColumns> packs[R][U];
};

template <bool WHOLE, typename T, int R, int U>
inline void load_rows(thread Rows<T, R, U>& rows, uint column, uint cols) {
#pragma unroll
  for (int u = 0; u < U; u++) {
#pragma unroll
    for (int r = 0; r < R; r++) load_pack<T, WHOLE>(rows.at[r], column + u * kBlockColumns, cols, rows.packs[r][u]);
  }
}

// N sums over a simdgroup at once, N a power of two: lane l gets that of values[l % N], and `values` is used up. At each
// step a lane hands half of its values on and takes over the other half, so all take 31 exchanges at most.
template <int N>
inline float sum_of_each(thread float* values, uint lane) {
#pragma unroll
  for (int half_of = N / 2; half_of > 0; half_of /= 2) {
    const bool upper = lane & half_of;
#pragma unroll
    for (int i = 0; i < half_of; i++) {
      const float kept = upper ? values[i + half_of] : values[i];
      const float other = upper ? values[i] : values[i + half_of];
      values[i] = kept + simd_shuffle_xor(other, half_of);
    }
  }
  float sum = values[0];
#pragma unroll
  for (int distance = N; distance < 32; distance *= 2) sum += simd_shuffle_xor(sum, distance);
  return sum;
}
