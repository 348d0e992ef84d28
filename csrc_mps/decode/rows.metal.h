// The rows of dense matrices, as the products of the decode step read them.
#pragma once
#include <metal_stdlib>
#include "common/pack.metal.h"
#include "decode/decode_params.h"
#include "decode/vectors.metal.h"
using namespace metal;
using namespace torch_fused;

// R rows of up to three matrices, and what a lane has loaded of U blocks of their columns.
template <typename T, int R, int U>
struct Rows {
  device const T *w0, *w1, *w2;
  long s0, s1, s2;  // elements from row to row
  device const T* at[R];
  Pack<T, kLaneColumns> packs[R][U];

  void point(int r, uint of, uint row) {
    at[r] = (of == 0 ? w0 : of == 1 ? w1 : w2) + long(row) * (of == 0 ? s0 : of == 1 ? s1 : s2);
  }
};

template <bool WHOLE, typename T, int R, int U>
inline void load_rows(thread Rows<T, R, U>& rows, uint column, uint cols) {
#pragma unroll
  for (int u = 0; u < U; u++) {
#pragma unroll
    for (int r = 0; r < R; r++) load_pack<T, WHOLE>(rows.at[r], column + u * kBlockColumns, cols, rows.packs[r][u]);
  }
}

// Adds the products of R rows' columns with as many values, whose sum is `total`, to as many sums.
template <int R, int U, typename T, int N>
inline void add_products(thread const Pack<T, N> (&packs)[R][U], int u, thread const float* x, float total,
                         thread float (&sums)[R]) {
#pragma unroll
  for (int r = 0; r < R; r++) {
#pragma unroll
    for (int j = 0; j < N; j++) sums[r] = fma(packs[r][u].get(j), x[j], sums[r]);
  }
}
