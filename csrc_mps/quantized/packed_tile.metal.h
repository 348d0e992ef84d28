// A tile of a matrix of four bits on a GPU's matrix units: 16 rows and WORDS words of each lane's two rows, times one
// vector.
//
// The eight codes of a word go to the matrix units in four pairs, code j with code j + 4. A code is not converted: its
// bits become part of a mantissa, and stand for 1 + code / 16. The vector's values are staged in threadgroup memory.
//
// A row of a tile has two halves, which may be in two groups. A single vector needs few of the units' eight columns:
// the first four have the products of the first half, and the others those of the second.
//
// cuda.h has the overloads for NVIDIA's units, which take 16 bits: there a value is three numbers that add up to it.
#pragma once
#include <metal_stdlib>
#include "decode/tile.metal.h"
#include "quantized/packed.metal.h"
using namespace metal;
using namespace torch_fused;

constant constexpr uint kStagedRows = 4;  // of 16 bits
constant constexpr int kWordCodes = 8;

// Where a word is staged: the lanes of a row read their words i next to each other.
template <int WORDS>
inline uint staged_place(uint word) {
  return word / (4 * WORDS) * (4 * WORDS) + word % WORDS * 4 + word / WORDS % 4;
}

// Keeps the vector's values for the codes of a word.
template <typename Word>
inline void stage_word(threadgroup Word* staged, uint place, thread const float* x) {
  threadgroup float* to = (threadgroup float*)staged + place * kWordCodes;
#pragma unroll
  for (int k = 0; k < kWordCodes; k++) to[k] = x[k];
}

// Adds the products of word i of each lane: `words` are of its two rows, `first` is the tile's first one that is
// staged.
template <int WORDS, typename Word, typename Lanes>
inline void multiply_word(thread float* sums, thread const uint* words, threadgroup const Word* staged, uint first,
                          int i, Lanes lanes, uint one) {
  const uint pair = lanes.vector_pairs[0], place = first + 4 * uint(i) + pair;
  threadgroup const float* from = (threadgroup const float*)staged + place * kWordCodes + 4 * lanes.vector_halves[0];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    float x[2], w[4];
#pragma unroll
    for (int k = 0; k < 2; k++) x[k] = lanes.vectors[k] == pair / 2 * 4 ? from[j] : 0.0f;
#pragma unroll
    for (int k = 0; k < 4; k++) w[k] = as_type<float>((words[k / 2] >> (4 * j + 16 * (k % 2)) & 15u) << 19 | one);
    multiply_tile(sums, w, x);
  }
}

// The sums of a row over its columns, for each of two rows.
template <typename Float>
inline void sum_columns(thread Float* rows, uint) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    rows[i] += simd_shuffle_xor(rows[i], ushort(1));
    rows[i] += simd_shuffle_xor(rows[i], ushort(8));
  }
}
