// Sums over a threadgroup.
#pragma once
#include <metal_stdlib>
using namespace metal;

// Where a thread stands in its threadgroup.
struct Place {
  uint lane;        // in its simdgroup
  uint simdgroup;   // in its threadgroup
  uint simdgroups;  // of the threadgroup
};

// The sum of `value` over all threads, given to each. `scratch` holds 32 values and is written once.
inline float threadgroup_sum(float value, threadgroup float* scratch, Place place) {
  value = simd_sum(value);
  if (place.lane == 0) scratch[place.simdgroup] = value;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return simd_sum(place.lane < place.simdgroups ? scratch[place.lane] : 0.0f);
}

// Several sums at once, for the barrier of one: each of the N values becomes its sum over all threads. `scratch` holds
// 32 * N values and is written once.
template <int N>
inline void threadgroup_sums(thread float* values, threadgroup float* scratch, Place place) {
#pragma unroll
  for (int i = 0; i < N; i++) {
    values[i] = simd_sum(values[i]);
    if (place.lane == 0) scratch[32 * i + place.simdgroup] = values[i];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
  for (int i = 0; i < N; i++) {
    values[i] = simd_sum(place.lane < place.simdgroups ? scratch[32 * i + place.lane] : 0.0f);
  }
}
