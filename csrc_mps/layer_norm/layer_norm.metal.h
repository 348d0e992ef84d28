// What the kernels of layer norm share: how a row's mean and variance are found.
//
// Each simdgroup, or in backward each thread, subtracts its own shift, the mean of the packs that it holds, before it
// adds anything up; the sums of all are then brought to one shift. So no sum cancels, the mean is exact to more than
// one float, and the threadgroup meets only once.
#pragma once
#include <metal_stdlib>
#include "common/reduce.metal.h"
#include "layer_norm/layer_norm_params.h"
using namespace metal;
using namespace torch_fused;

template <int W>
inline void fill(thread float* x, float value) {
#pragma unroll
  for (int j = 0; j < W; j++) x[j] = value;
}

template <int W>
inline float pack_sum(thread const float* x) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < W; j++) sum += x[j];
  return sum;
}

// How many of W values from `column` on are in the row.
template <int W>
inline uint in_row(uint column, uint cols) {
  return column < cols ? min(cols - column, uint(W)) : 0u;
}

// What a thread, then its simdgroup, has seen of a row: the number of values x, and the sums of x - shift and of its
// square.
struct Seen {
  float shift;
  uint count;
  float sum;
  float squares;

  template <int W>
  void add(uint column, uint cols, thread const float* x) {
    const uint values = in_row<W>(column, cols);
    count += values;
    if (values == W) {
#pragma unroll
      for (int j = 0; j < W; j++) add_one(x[j]);
    } else {
#pragma unroll
      for (int j = 0; j < W; j++) {
        if (uint(j) < values) add_one(x[j]);
      }
    }
  }

  void add_one(float x) {
    const float difference = x - shift;
    sum += difference;
    squares = fma(difference, difference, squares);
  }

  float4 packed() const { return float4(shift, float(count), sum, squares); }

  // The same values with another shift, which costs a rounding or two.
  Seen about(float other) const {
    const float distance = shift - other;
    const float moved = fma(float(count), distance, sum);
    return {other, count, moved, fma(distance, sum + moved, squares)};
  }

  Seen of_simdgroup() const {
    const Seen mine = about(simd_broadcast_first(shift));
    return {mine.shift, simd_sum(count), simd_sum(mine.sum), simd_sum(mine.squares)};
  }
};

// Of the row times `unit`, which is 1 unless sums of its values would overflow. The mean is in two parts, of which the
// second is what the first one's rounding left.
struct Moments {
  float unit;
  float mean;
  float rest;
  float rstd;  // 1 / sqrt(variance + eps)

  float normed(float x) const { return fma(fma(x, unit, -mean), rstd, -rest * rstd); }

  bool overflowed() const { return !(rstd > 0.0f); }
};

// The unit of a row whose values are too large for their squares, and their sum, to be finite: 2^-80.
constant constexpr float SMALL_UNIT = 8.27180612553027674871408e-25f;

// From what each simdgroup has seen, which stands in `all`.
inline Moments moments_of(threadgroup const float4* all, uint cols, float eps, Place place, float unit = 1.0f) {
  const float shift = all[0].x;
  float sum = 0.0f, squares = 0.0f;
  if (place.lane < place.simdgroups) {
    const float4 seen = all[place.lane];
    const float distance = seen.x - shift;
    sum = fma(seen.y, distance, seen.z);
    squares = fma(distance, seen.z + sum, seen.w);
  }
  sum = simd_sum(sum);
  const float rest = sum / float(cols);
  const float variance = fma(-sum, rest, simd_sum(squares)) / float(cols);  // NaN if sums overflow
  const float mean = shift + rest;
  float rstd = rsqrt((variance <= 0.0f ? 0.0f : variance) + eps * unit * unit);
  if (unit != 1.0f && variance <= 0.0f) rstd = rsqrt(eps) / unit;  // all values are the same
  return {unit, mean, rest - (mean - shift), rstd};
}

// The same for what this simdgroup has seen. `scratch` holds 32 values and is written once.
inline Moments row_moments(Seen mine, uint cols, float eps, threadgroup float4* scratch, Place place,
                           float unit = 1.0f) {
  if (place.lane == 0) scratch[place.simdgroup] = mine.packed();
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return moments_of(scratch, cols, eps, place, unit);
}

// The moments of a row whose sums have overflowed, from small values, read again. All threads have read `scratch`.
template <typename T>
inline Moments small_row_moments(device const T* row, uint cols, float eps, threadgroup float4* scratch, Place place) {
  const uint first = place.simdgroup * 32 + place.lane;
  const uint step = place.simdgroups * 32;
  float sum = 0.0f;
  uint count = 0u;
  for (uint column = first; column < cols; column += step) {
    sum += float(row[column]) * SMALL_UNIT;
    count += 1u;
  }
  Seen seen = {simd_sum(sum) / float(max(simd_sum(count), 1u)), count, 0.0f, 0.0f};
  for (uint column = first; column < cols; column += step) seen.add_one(float(row[column]) * SMALL_UNIT);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return row_moments(seen.of_simdgroup(), cols, eps, scratch, place, SMALL_UNIT);
}
