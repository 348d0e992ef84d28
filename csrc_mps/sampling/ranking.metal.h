// The sampling order of a row: larger logits first, equal ones by index. A row is divided into buckets of tokens that
// follow one another, at tokens of a sample of it, so that buckets hold about as many tokens each whatever the logits
// are. The place of a token in the row is in one bucket, which is sorted; one that is too large for that is divided
// again, its range of tokens into equal parts.
#pragma once
#include <metal_stdlib>
#include "common/scan.metal.h"
#include "common/token_weight.h"
#include "sampling/sort.metal.h"
using namespace metal;
using namespace torch_fused;

struct SamplingParams {
  long row_stride;
  ulong seed;
  ulong offset;
  float scale;
  float top_k;
  float top_p;
  float min_p;
  uint vocabulary;
  uint slices;  // of a row
  uint flags;
};

constant constexpr uint SLICE = 2048;  // tokens that a threadgroup divides
constant constexpr uint SLICE_THREADS = SLICE / PER_THREAD;
constant constexpr uint BUCKETS = 256;
constant constexpr uint THREADS = 1024;      // that search a row
constant constexpr uint PLACES = 2;          // of each of them in what is sorted
constant constexpr uint MOST_SORTED = PLACES * THREADS;
constant constexpr uint ROW_PARAMETERS = 1;  // flags: the filter of each row is in a buffer
constant constexpr uint STATE = 2;           // seed and offset are in a buffer

// A token is its key above its inverted index, so that the order is that of integers, descending. 0 is none.
constant constexpr uint INDEX_BITS = 20;
constant constexpr uint LAST_INDEX = (1u << INDEX_BITS) - 1u;

inline ulong make_token(uint key, uint index) {
  return key == 0u ? 0 : (ulong(key) << INDEX_BITS) + (LAST_INDEX - index);
}
inline uint token_key(ulong token) {
  return uint(token >> INDEX_BITS);
}
inline uint token_index(ulong token) {
  return LAST_INDEX - (uint(token) & LAST_INDEX);
}

struct Weigher {
  float maximum;
  float scale;

  // No token of the row is larger.
  ulong first() const { return make_token(order_key(as_type<uint>(maximum)), 0u); }

  ulong weight(ulong token) const {
    if (token == 0) return 0;
    return token_weight(steps_below(maximum, as_type<float>(key_bits(token_key(token))), scale));
  }
};

// From the largest keys of a row's slices; by each simdgroup.
inline Weigher row_weigher(device const uint* maxima, uint slices, float scale, uint lane) {
  uint largest = 0u;
  for (uint i = lane; i < slices; i += 32) largest = max(largest, maxima[i]);
  return {as_type<float>(key_bits(simd_max(largest))), scale};
}

// Values in a buffer nobody could check without waiting for the device: they are clamped.
inline TokenFilter row_filter(constant SamplingParams& p, device const float* row_parameters, uint row) {
  if (!(p.flags & ROW_PARAMETERS)) return token_filter(p.scale, p.top_k, p.top_p, p.min_p);
  device const float* values = row_parameters + 4 * row;
  const float scale = values[0] >= 0.0f ? values[0] : 0.0f;
  return token_filter(scale, clamp(values[1], 0.0f, 1048576.0f), clamp(values[2], 0.0f, 1.0f),
                      clamp(values[3], 0.0f, 1.0f));
}

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

struct Reached {
  ulong token;
  ulong mass;  // of the row up to and with it
};

// Threadgroup memory for the search of a row.
struct Workspace {
  threadgroup ulong* tokens;  // MOST_SORTED
  threadgroup ulong* sums;    // 32
  threadgroup Reached* reached;
  threadgroup atomic_uint* found;
  RunningTallies buckets;
  RunningTallies parts;  // of a bucket that is divided again
  Bins bins;
};

// Tokens that follow one another in a row. Once they are sorted, a thread has those at THREADS from each other.
struct Range {
  ulong tokens[PLACES];  // 0 for none
  ulong masses[PLACES];  // of the row up to and with that token
  ulong weights[PLACES];
  Tally before;  // what precedes the range
  Tally until;   // and with it
  ulong first;   // first >= token > last
  ulong last;
};

// One row as the launches before have left it, seen by one thread of those that search it.
struct Ranking {
  device const ulong* tokens;     // of each slice, bucket after bucket
  device const uint* segments;    // where in a slice each bucket is: start * 2 * SLICE + count
  device const ulong* masses;     // the weight of each slice's buckets
  device const ulong* splitters;  // the last token that each bucket could have
  uint slices;
  Weigher weigher;
  Workspace space;
  uint thread_id;
  Place place;

  // The tallies of the row's buckets from those of its slices: four threads a bucket.
  void add_slices() const {
    const uint bucket = thread_id % BUCKETS;
    Tally mine = {0u, 0};
#pragma unroll 8
    for (uint i = thread_id / BUCKETS; i < slices; i += THREADS / BUCKETS) {
      mine.count += segments[i * BUCKETS + bucket] % (2 * SLICE);
      mine.mass += masses[i * BUCKETS + bucket];
    }
    space.bins.clear(thread_id);
    space.tokens[thread_id] = mine.mass;
    atomic_fetch_add_explicit(&space.bins.counts[bucket], mine.count, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (thread_id < BUCKETS) {
      mine = {space.bins.count(bucket), 0};
      for (uint i = bucket; i < THREADS; i += BUCKETS) mine.mass += space.tokens[i];
    }
    space.buckets.set(mine, space.sums, thread_id, place);
  }

  Tally all() const { return space.buckets.until(BUCKETS - 1); }

  // Places from .x up to .y of a slice hold the tokens of buckets from `bucket` to `end`.
  uint2 segment(uint slice, uint bucket, uint end) const {
    const uint last = segments[slice * BUCKETS + end];
    return uint2(segments[slice * BUCKETS + bucket] / (2 * SLICE), last / (2 * SLICE) + last % (2 * SLICE));
  }

  ulong last_of(uint bucket) const { return max(splitters[bucket], ulong(1)) - 1; }

  // Divides the range, which lies in one bucket, until it can be sorted.
  void narrow(bool by_mass, ulong target, uint bucket, thread Range& range) const {
    while (range.until.count - range.before.count > MOST_SORTED) {
      const ulong width = (range.first - range.last) / BUCKETS + 1;
      space.bins.clear(thread_id);
      for (uint i = place.simdgroup; i < slices; i += place.simdgroups) {
        const uint2 places = segment(i, bucket, bucket);
        for (uint j = places.x + place.lane; j < places.y; j += 32) {
          const ulong token = tokens[i * SLICE + j];
          if (token > range.first || token <= range.last) continue;
          space.bins.add_to_many(uint((range.first - token) / width), weigher.weight(token));
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      Tally mine = {0u, 0};
      if (thread_id < BUCKETS) mine = {space.bins.count(thread_id), space.bins.mass_of_many(thread_id)};
      space.parts.set(mine, space.sums, thread_id, place);
      const Tally before = range.before;
      const uint part = space.parts.bucket_of(by_mass, target - (by_mass ? before.mass : before.count), place);
      const Tally skipped = space.parts.before(part), with = space.parts.until(part);
      range.before = {before.count + skipped.count, before.mass + skipped.mass};
      range.until = {before.count + with.count, before.mass + with.mass};
      range.first -= part * width;
      range.last = max(range.last, range.first - min(range.first, width));
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
  }

  // Collects the range's tokens, which lie in buckets from `bucket` to `end`, in any order, and sorts them.
  void sort_range(uint bucket, uint end, thread Range& range) const {
    if (thread_id == 0) atomic_store_explicit(space.found, 0u, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = place.simdgroup; i < slices; i += place.simdgroups) {
      const uint2 places = segment(i, bucket, end);
      for (uint j = places.x; j < places.y; j += 32) {
        const ulong token = j + place.lane < places.y ? tokens[i * SLICE + j + place.lane] : 0;
        const uint is_found = token > range.last && token <= range.first ? 1u : 0u;
        const uint before = simd_prefix_exclusive_sum(is_found), all = simd_sum(is_found);
        uint slot = 0u;
        if (place.lane == 0) slot = atomic_fetch_add_explicit(space.found, all, memory_order_relaxed);
        slot = simd_broadcast_first(slot) + before;
        if (is_found != 0u) space.tokens[slot] = token;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const uint found = range.until.count - range.before.count;
    uint sorters = 32;
    while (sorters * PER_THREAD < found) sorters *= 2;
    ulong mine[PER_THREAD];
#pragma unroll
    for (uint j = 0; j < PER_THREAD; j++) {
      const uint i = j * sorters + thread_id;
      mine[j] = thread_id < sorters && i < found ? space.tokens[i] : 0;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    sort_tokens(mine, space.tokens, sorters, thread_id, place.lane);
    if (thread_id < sorters) {
#pragma unroll
      for (uint j = 0; j < PER_THREAD; j++) space.tokens[j * sorters + thread_id] = mine[j];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    ulong mass = range.before.mass;
#pragma unroll
    for (uint k = 0; k < PLACES; k++) {
      const uint i = k * THREADS + thread_id;
      range.tokens[k] = i < found ? space.tokens[slot_of(i, sorters)] : 0;
      range.weights[k] = weigher.weight(range.tokens[k]);
      const Running running = threadgroup_scan(range.weights[k], space.sums, place);
      range.masses[k] = mass + running.sum;
      mass += running.total;
    }
  }

  // The token up to and with which there are `target` tokens, or, by_mass, that weight; 1 <= target <= all.
  Reached reach(bool by_mass, ulong target, thread Range& range) const {
    const bool is_in_range = by_mass ? range.before.mass < target && target <= range.until.mass
                                     : range.before.count < target && target <= range.until.count;
    if (!is_in_range) {
      const uint end = space.buckets.bucket_of(by_mass, target, place);
      range.until = space.buckets.until(end);
      // Few tokens from the row's first on are taken as they are: they serve for what comes next too.
      const uint bucket = range.until.count <= MOST_SORTED ? 0u : end;
      range.before = space.buckets.before(bucket);
      range.first = bucket == 0u ? weigher.first() : last_of(bucket - 1);
      range.last = last_of(end);
      narrow(by_mass, target, bucket, range);
      sort_range(bucket, end, range);
    }
#pragma unroll
    for (uint k = 0; k < PLACES; k++) {
      const ulong sum = by_mass ? range.masses[k] : range.before.count + k * THREADS + thread_id + 1;
      const ulong step = by_mass ? range.weights[k] : 1;
      if (range.tokens[k] == 0 || sum - step >= target || sum < target) continue;
      *space.reached = {range.tokens[k], range.masses[k]};
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const Reached reached = *space.reached;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return reached;
  }

  // The weight of the tokens that are not smaller than `end`, which is in `range` or behind it.
  ulong mass_until(ulong end, Range range) const {
    if (end > range.last) {
      ulong mass = 0;
#pragma unroll
      for (uint k = 0; k < PLACES; k++) mass += range.tokens[k] >= end ? range.weights[k] : 0;
      return range.before.mass + threadgroup_scan(mass, space.sums, place).total;
    }
    uint passed = 0u;
    for (uint i = place.lane; i < BUCKETS; i += 32) passed += splitters[i] > end ? 1u : 0u;
    const uint bucket = simd_sum(passed);
    ulong mass = 0;
    for (uint i = place.simdgroup; i < slices; i += place.simdgroups) {
      const uint2 places = segment(i, bucket, bucket);
      for (uint j = places.x + place.lane; j < places.y; j += 32) {
        const ulong token = tokens[i * SLICE + j];
        if (token >= end) mass += weigher.weight(token);
      }
    }
    return space.buckets.before(bucket).mass + threadgroup_scan(mass, space.sums, place).total;
  }
};

// What a filter keeps of a row.
struct Kept {
  ulong last;   // tokens that are not smaller
  ulong total;  // their weight; 0: nothing can be drawn
  ulong drawn;  // one of them
};

// Three places at most: of the k-th token, of the last in top_p, and of the one that 64 random bits stand for.
inline Kept search_row(Ranking row, TokenFilter filter, device const ulong* heavy, bool draws, ulong bits) {
  const Tally all = row.all();
  Kept kept = {1, all.mass, 0};
  Range range = {{}, {}, {}, {0, 0}, {0, 0}, 0, 0};
  for (uint step = 0; step < 3 && all.count != 0u; step++) {
    ulong target = filter.top_k;
    if (step == 0 && (target == 0 || target >= all.count)) continue;
    if (step == 1) {
      if (filter.top_p >= kNoTopP) continue;
      target = top_p_target(kept.total, filter.top_p);
    }
    if (step == 2) {
      if (filter.min_weight > 1) {  // lighter tokens than that have no weight
        ulong mass = 0;
        for (uint i = row.place.lane; i < row.slices; i += 32) mass += heavy[i];
        kept.total = min(kept.total, simd_total(mass));
      }
      if (!draws || kept.total == 0) break;
      target = isinf(filter.scale) ? 1 : random_below(bits, kept.total) + 1;
    }
    const Reached reached = row.reach(step != 0, target, range);
    if (step == 0) {
      kept.last = ulong(token_key(reached.token)) << INDEX_BITS;  // and all its ties
      kept.total = row.mass_until(kept.last, range);
    } else if (step == 1) {
      kept.last = reached.token;
      kept.total = reached.mass;
    } else {
      kept.drawn = reached.token;
    }
  }
  return kept;
}
