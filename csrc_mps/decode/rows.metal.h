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
    for (int r = 0; r < R; r++) {
      load_pack<T, WHOLE, true>(rows.at[r], column + u * kBlockColumns, cols, rows.packs[r][u]);
    }
  }
}

// Adds the products of R rows' columns, of block u, with as many values to as many sums.
template <int R, int U, typename T>
inline void add_products(thread const Rows<T, R, U>& rows, int u, thread const float* x, thread float (&sums)[R]) {
#pragma unroll
  for (int r = 0; r < R; r++) {
#pragma unroll
    for (uint j = 0; j < kLaneColumns; j++) sums[r] = fma(rows.packs[r][u].get(j), x[j], sums[r]);
  }
}
