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

// The sum of a simdgroup's values, given to each thread.
inline ulong simd_total(ulong value) {
  for (ushort distance = 16; distance > 0; distance /= 2) {
    value += as_type<ulong>(simd_shuffle_xor(as_type<uint2>(value), distance));
  }
  return value;
}

// Adds to each thread's value those of the lanes before it.
inline ulong simd_running(ulong value, uint lane) {
  for (ushort distance = 1; distance < 32; distance *= 2) {
    const ulong other = as_type<ulong>(simd_shuffle_up(as_type<uint2>(value), distance));
    if (lane >= distance) value += other;
  }
  return value;
}

// `scratch` holds 32 values and may be reused after the call.
inline Running threadgroup_scan(ulong value, threadgroup ulong* scratch, Place place) {
  const ulong sum = simd_running(value, place.lane);
  if (place.lane == 31) scratch[place.simdgroup] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const ulong part = place.lane < place.simdgroups ? scratch[place.lane] : 0;
  const ulong parts = simd_running(part, place.lane);
  const ulong before = as_type<ulong>(simd_shuffle(as_type<uint2>(parts - part), ushort(place.simdgroup)));
  const ulong total = as_type<ulong>(simd_shuffle(as_type<uint2>(parts), ushort(31)));
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return {before + sum, total};
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
