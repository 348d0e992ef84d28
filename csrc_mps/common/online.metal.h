// The maximum and the sum of exponentials of a row that is read once.
#pragma once
#include <metal_stdlib>
#include "common/reduce.metal.h"
using namespace metal;

// The largest value seen so far and the sum of exp(x - largest). A maximum of -inf, of nothing or of masked values,
// leaves the sum 0; the result is NaN then, as torch's, because -inf - -inf is.
struct Online {
  float largest;
  float sum;

  static float shift(float largest) { return largest == -INFINITY ? 0.0f : largest; }

  template <int W>
  void add(thread const float* x) {
    float top = largest;
#pragma unroll
    for (int j = 0; j < W; j++) top = max(top, x[j]);
    const float by = shift(top);
    sum *= exp(largest - by);
#pragma unroll
    for (int j = 0; j < W; j++) sum += exp(x[j] - by);
    largest = top;
  }

  // Of what both have seen.
  Online with(Online other) const {
    const float top = max(largest, other.largest);
    const float by = shift(top);
    return {top, sum * exp(largest - by) + other.sum * exp(other.largest - by)};
  }

  // Of the simdgroup, given to each thread.
  Online of_simdgroup() const {
    const float top = simd_max(largest);
    return {top, simd_sum(sum * exp(largest - shift(top)))};
  }

  // Of the threadgroup, from each simdgroup's. `scratch` holds 32 values and is written once.
  Online of_threadgroup(threadgroup float2* scratch, Place place) const {
    if (place.lane == 0) scratch[place.simdgroup] = float2(largest, sum);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    Online part = {-INFINITY, 0.0f};
    if (place.lane < place.simdgroups) part = {scratch[place.lane].x, scratch[place.lane].y};
    return part.of_simdgroup();
  }
};
