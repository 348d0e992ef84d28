// Sorts tokens, largest first, in registers, E a thread: some comparisons need no other thread, most others a
// simdgroup, and the fewest threadgroup memory. E is a power of two from 2 on; many are less work, few are ready
// sooner.
//
// Batcher's bitonic network in the form in which every comparison has one direction: a merge begins with each token and
// its mirror image, and goes on with the token half as far away, then a quarter and so on.
#pragma once
#include <metal_stdlib>
using namespace metal;

inline void order_pair(thread ulong& a, thread ulong& b) {
  const bool swap = a < b;
  const ulong larger = swap ? b : a;
  b = swap ? a : b;
  a = larger;
}

inline ulong kept_of(ulong mine, ulong other, bool keeps_larger) {
  return (other > mine) == keeps_larger ? other : mine;
}

template <uint E>
inline void merge_own(thread ulong* tokens) {
#pragma unroll
  for (uint distance = E / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (uint j = 0; j < E; j++) {
      if ((j & distance) == 0) order_pair(tokens[j], tokens[j + distance]);
    }
  }
}

template <uint E>
inline void sort_own(thread ulong* tokens) {
#pragma unroll
  for (uint width = 2; width <= E; width *= 2) {
#pragma unroll
    for (uint j = 0; j < E; j++) {
      if ((j & (width / 2)) == 0) order_pair(tokens[j], tokens[j ^ (width - 1)]);
    }
#pragma unroll
    for (uint distance = width / 4; distance > 0; distance /= 2) {
#pragma unroll
      for (uint j = 0; j < E; j++) {
        if ((j & distance) == 0) order_pair(tokens[j], tokens[j + distance]);
      }
    }
  }
}

inline ulong from_lane(ulong token, ushort mask) {
  return as_type<ulong>(simd_shuffle_xor(as_type<uint2>(token), mask));
}

// With the thread whose lane differs in the bits of `mask`, of which the highest says who keeps the larger tokens.
template <uint E, bool MIRRORED>
inline void compare_with_lane(thread ulong* tokens, ushort mask, bool keeps_larger) {
#pragma unroll
  for (uint j = 0; j < E / 2; j++) {
    const uint image = E - 1 - j;
    const ulong a = from_lane(tokens[MIRRORED ? image : j], mask);
    const ulong b = from_lane(tokens[MIRRORED ? j : image], mask);
    tokens[j] = kept_of(tokens[j], a, keeps_larger);
    tokens[image] = kept_of(tokens[image], b, keeps_larger);
  }
}

// The steps of a merge from the lane `distance` away on.
template <uint E>
inline void merge_in_simdgroup(thread ulong* tokens, uint distance, uint lane) {
  for (; distance > 0; distance /= 2) compare_with_lane<E, false>(tokens, ushort(distance), (lane & distance) == 0);
  merge_own<E>(tokens);
}

template <uint E>
inline void sort_in_simdgroup(thread ulong* tokens, uint lane) {
  sort_own<E>(tokens);
  for (uint width = 2; width <= 32; width *= 2) {
    compare_with_lane<E, true>(tokens, ushort(width - 1), (lane & (width / 2)) == 0);
    merge_in_simdgroup<E>(tokens, width / 4, lane);
  }
}

// Sorts the tokens of the first `sorters` threads, a power of two from 32 on: place p is then token p % E of thread p /
// E. `exchange` holds a token a place. Every thread of the threadgroup calls this.
template <uint E>
inline void sort_tokens(thread ulong* tokens, threadgroup ulong* exchange, uint sorters, uint thread_id, uint lane) {
  const bool sorts = thread_id < sorters;
  if (sorts) sort_in_simdgroup<E>(tokens, lane);
  for (uint width = 64; width <= sorters; width *= 2) {
    for (uint distance = width / 2; distance >= 32; distance /= 2) {
      const bool mirrored = distance == width / 2;
      if (sorts) {
#pragma unroll
        for (uint j = 0; j < E; j++) exchange[j * sorters + thread_id] = tokens[j];
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (sorts) {
        const uint other = thread_id ^ (mirrored ? width - 1 : distance);
        const bool keeps_larger = (thread_id & distance) == 0;
#pragma unroll
        for (uint j = 0; j < E; j++) {
          const uint from = mirrored ? E - 1 - j : j;
          tokens[j] = kept_of(tokens[j], exchange[from * sorters + other], keeps_larger);
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (sorts) merge_in_simdgroup<E>(tokens, 16, lane);
  }
}
