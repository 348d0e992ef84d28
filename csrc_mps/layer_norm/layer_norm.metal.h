// What the kernels of layer norm share: the flags of a launch (layer_norm_launch.cpp has the same names) and how a
// row's mean and variance are found.
//
// The mean is found in two parts, shift + rest, so that it is exact to more than one float: shift is the mean of the
// packs that the threads hold, the whole row if it fits in registers, and rest is the mean of x - shift.
#pragma once
#include <metal_stdlib>
using namespace metal;

constant constexpr uint ALIGNED = 1;  // every row of every operand starts at 16 bytes
constant constexpr uint HAS_WEIGHT = 2;
constant constexpr uint HAS_BIAS = 4;
constant constexpr uint GRAD_WEIGHT = 8;  // the weight needs a gradient
constant constexpr uint GRAD_BIAS = 16;   // the bias does

template <int W>
inline float pack_sum(thread const float* x) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < W; j++) sum += x[j];
  return sum;
}

// x becomes x - shift, and zero past the end of the row, which adds nothing to a sum.
template <int W>
inline void subtract(uint column, uint cols, float shift, thread float* x) {
#pragma unroll
  for (int j = 0; j < W; j++) x[j] = column + j < cols ? x[j] - shift : 0.0f;
}

struct Moments {
  float rest;  // the mean less shift
  float rstd;  // 1 / sqrt(variance + eps)

  float normed(float x_less_shift) const { return fma(x_less_shift, rstd, -rest * rstd); }
};

// From the sums of x - shift and of its square.
inline Moments row_moments(float sum, float squares, uint cols, float eps) {
  const float rest = sum / float(cols);
  return {rest, rsqrt(max(squares / float(cols) - rest * rest, 0.0f) + eps)};
}
