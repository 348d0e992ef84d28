// Running sums and maxima over a threadgroup. Sums of 64-bit integers go through pairs of 32 bits, as Metal's simdgroup
// functions take no wider ones.
#pragma once
#include <metal_stdlib>
#include "common/reduce.metal.h"
using namespace metal;

struct Running {
  ulong sum;    // of the values of this thread and those before it
  ulong total;  // of all threads
};

// `scratch` holds 32 values and may be reused after the call.
inline Running threadgroup_scan(ulong value, threadgroup ulong* scratch, Place place) {
  for (ushort distance = 1; distance < 32; distance *= 2) {
    const ulong other = as_type<ulong>(simd_shuffle_up(as_type<uint2>(value), distance));
    if (place.lane >= distance) value += other;
  }
  if (place.lane == 31) scratch[place.simdgroup] = value;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  Running running = {value, 0};
  for (uint i = 0; i < place.simdgroups; i++) {
    if (i < place.simdgroup) running.sum += scratch[i];
    running.total += scratch[i];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return running;
}

// The largest `value` of all threads, given to each. `scratch` as above.
inline uint threadgroup_max(uint value, threadgroup uint* scratch, Place place) {
  value = simd_max(value);
  if (place.lane == 0) scratch[place.simdgroup] = value;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  value = simd_max(place.lane < place.simdgroups ? scratch[place.lane] : 0u);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return value;
}
