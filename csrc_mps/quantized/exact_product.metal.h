// The product of a packed row with a vector by one thread, weight by weight: for results of the matrix units that are
// no numbers, because infinities or overflows cancelled in them.
#pragma once
#include <metal_stdlib>
#include "decode/decode_params.h"
#include "decode/vectors.metal.h"
#include "quantized/packed.metal.h"
using namespace metal;
using namespace torch_fused;

// The product of a row with a vector, times the norm's weights.
template <int BITS, typename T, typename X>
inline float exact_product(PackedRow row, device const X* vector, device const T* norm, PackedGroups<T, true> groups,
                           constant ProductParams& p) {
  float sum = 0.0f;
#pragma unroll 1
  for (uint column = 0; column < p.cols; column += kLaneColumns) {
    Pack<X, kLaneColumns> pack;
    load_pack<X, true>(vector, column, p.cols, pack);
    float x[kLaneColumns];
    pack.unpack(x);
    for (uint j = 0; p.flags & kNormed && j < kLaneColumns; j++) x[j] *= float(norm[column + j]) + p.norm_offset;
    PackedPack<BITS, kLaneColumns, T> weights;
    load_packed<BITS, kLaneColumns, true>(row, column, true, groups, weights);
    sum += weights.exact_product(x);
  }
  return sum;
}
