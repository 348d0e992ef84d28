// A simdgroup's product of 16 rows with 8 vectors, on the GPU's matrix units, in float32.
//
// A tile is 64 columns in runs of eight, and the matrix units take one column of every run at once. A lane holds a pair
// of runs, pair and pair + 4, of two rows: `row` and `row` + 8. Of the vectors it holds two runs, and of the results
// vectors `result` and `result` + 1 of its two rows. Which ones is up to the GPU: cuda.h has the overloads for NVIDIA's.
#pragma once
#include <metal_stdlib>
#include "decode/decode_params.h"
using namespace metal;
using namespace torch_fused;

struct TileLane {
  uint row, pair;
  uint vectors[2], vector_pairs[2], vector_halves[2];
  uint result;
};

// As Metal's `thread_elements` are laid out: two elements of a row.
template <typename Lane, typename Place>
inline void tile_lane(Lane lane, thread Place& at) {
  const uint row = (lane >> 2 & 4) + (lane >> 1 & 3), column = (lane >> 1 & 4) + (lane & 1) * 2;
  at.row = row, at.pair = column / 2, at.result = column;
#pragma unroll
  for (uint i = 0; i < 2; i++) at.vectors[i] = column + i, at.vector_pairs[i] = row / 2, at.vector_halves[i] = row % 2;
}

// Where a run begins.
inline uint run_column(uint pair, uint half_of_pair) {
  return (pair + 4 * half_of_pair) * kLaneColumns;
}

// Adds the products of one column of each run: w has it of (row, pair), (row, pair + 4) and then of row + 8, x of both
// of the vectors' runs. Sums are of `row`, two vectors, and then of row + 8.
template <typename Float>
inline void multiply_tile(thread Float* sums, thread const Float* w, thread const Float* x) {
  simdgroup_matrix<Float, 8, 8> rows, columns, products;
#pragma unroll
  for (int k = 0; k < 2; k++) columns.thread_elements()[k] = x[k];
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
#pragma unroll
    for (int k = 0; k < 2; k++) {
      rows.thread_elements()[k] = w[i + k];
      products.thread_elements()[k] = sums[i + k];
    }
    simdgroup_multiply_accumulate(products, rows, columns, products);
#pragma unroll
    for (int k = 0; k < 2; k++) sums[i + k] = products.thread_elements()[k];
  }
}

// Each lane has parts of the sums of two vectors' runs, and gets the sums of vectors `result` and `result` + 1.
template <typename Float>
inline void sum_of_runs(thread Float* parts, uint) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    parts[i] += simd_shuffle_xor(parts[i], ushort(2));
    parts[i] += simd_shuffle_xor(parts[i], ushort(4));
    parts[i] += simd_shuffle_xor(parts[i], ushort(16));
  }
}
