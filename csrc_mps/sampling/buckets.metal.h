// The tallies of a row's buckets: collected in threadgroup memory, then added up from the first bucket on.
#pragma once
#include <metal_stdlib>
#include "common/scan.metal.h"
#include "sampling/tokens.metal.h"
using namespace metal;

// Counts and weights of tokens by bucket, in threadgroup memory.
struct Bins {
  threadgroup atomic_uint* counts;
  threadgroup atomic_uint* low;
  threadgroup atomic_uint* high;

  void clear(uint thread_id) const {
    if (thread_id < BUCKETS) {
      atomic_store_explicit(&counts[thread_id], 0u, memory_order_relaxed);
      atomic_store_explicit(&low[thread_id], 0u, memory_order_relaxed);
      atomic_store_explicit(&high[thread_id], 0u, memory_order_relaxed);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  // One of up to SLICE tokens: the sums of both halves of 20 bits fit in 32. Returns how many came before into the bin.
  uint add(uint bin, ulong weight) const {
    atomic_fetch_add_explicit(&low[bin], uint(weight) & 0xfffffu, memory_order_relaxed);
    atomic_fetch_add_explicit(&high[bin], uint(weight >> 20), memory_order_relaxed);
    return atomic_fetch_add_explicit(&counts[bin], 1u, memory_order_relaxed);
  }
  ulong mass(uint bin) const { return (ulong(word(high, bin)) << 20) + word(low, bin); }

  // One of any number of tokens: the low word carries into the high one.
  void add_to_many(uint bin, ulong weight) const {
    const uint part = uint(weight);
    const uint before = atomic_fetch_add_explicit(&low[bin], part, memory_order_relaxed);
    const uint rest = uint(weight >> 32) + (before + part < before ? 1u : 0u);
    if (rest != 0u) atomic_fetch_add_explicit(&high[bin], rest, memory_order_relaxed);
    atomic_fetch_add_explicit(&counts[bin], 1u, memory_order_relaxed);
  }
  ulong mass_of_many(uint bin) const { return ulong(word(high, bin)) << 32 | word(low, bin); }

  uint count(uint bin) const { return word(counts, bin); }
  static uint word(threadgroup atomic_uint* words, uint bin) {
    return atomic_load_explicit(&words[bin], memory_order_relaxed);
  }
};

// Tokens, and their weight.
struct Tally {
  uint count;
  ulong mass;
};

// The tallies of a row's buckets in device memory, to which all its slices add: counts, then the masses, of less than
// 2^60, in three parts of 20 bits, so that their sums over the slices fit in 32 bits and need no carry.
constant constexpr uint TALLIES = 4;

inline void add_to_row(device atomic_uint* tally, Tally mine) {
  if (mine.count == 0u) return;
  atomic_fetch_add_explicit(&tally[0], mine.count, memory_order_relaxed);
#pragma unroll
  for (uint i = 1; i < TALLIES; i++) {
    const uint part = uint(mine.mass >> (20 * (i - 1))) & 0xfffffu;
    atomic_fetch_add_explicit(&tally[i * BUCKETS], part, memory_order_relaxed);
  }
}

inline Tally read_tally(device const uint* tally) {
  const ulong low = tally[BUCKETS], middle = tally[2 * BUCKETS], high = tally[3 * BUCKETS];
  return {tally[0], low + (middle << 20) + (high << 40)};
}

// The running tallies of buckets.
struct RunningTallies {
  threadgroup uint* counts;
  threadgroup ulong* masses;

  // From the tally of the bucket that has this thread's number.
  void set(Tally mine, threadgroup ulong* scratch, uint thread_id, Place place) const {
    const uint count = uint(threadgroup_scan(thread_id < BUCKETS ? mine.count : 0u, scratch, place).sum);
    const ulong mass = threadgroup_scan(thread_id < BUCKETS ? mine.mass : 0, scratch, place).sum;
    if (thread_id < BUCKETS) {
      counts[thread_id] = count;
      masses[thread_id] = mass;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  Tally until(uint bucket) const { return {counts[bucket], masses[bucket]}; }
  Tally before(uint bucket) const {
    if (bucket == 0u) return {0u, 0};
    return until(bucket - 1);
  }

  // The bucket that the place up to and with which there are `target` tokens, or, by_mass, that weight, is in.
  uint bucket_of(bool by_mass, ulong target, Place place) const {
    uint passed = 0u;
    for (uint i = place.lane; i < BUCKETS; i += 32) passed += (by_mass ? masses[i] : counts[i]) < target ? 1u : 0u;
    return simd_sum(passed);
  }
};
