// The sampling order of a row: larger logits first, equal ones by index. A row is divided into buckets of tokens that
// follow one another, at tokens of a sample of it, so that buckets hold about as many tokens each whatever the logits
// are. The place of a token in the row is in one bucket, which is sorted; one that is too large for that is divided
// again, its range of tokens into equal parts.
#pragma once
#include <metal_stdlib>
#include "common/scan.metal.h"
#include "sampling/buckets.metal.h"
#include "sampling/sort.metal.h"
#include "sampling/tokens.metal.h"
using namespace metal;
using namespace torch_fused;

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

// Tokens that follow one another in a row. Once they are sorted, each thread has the next PLACES of them.
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
  device const uint* tallies;     // of the row's buckets
  device const ulong* splitters;  // the last token that each bucket could have
  uint slices;
  Weigher weigher;
  Workspace space;
  uint thread_id;
  Place place;

  void read_tallies() const {
    Tally mine = {0u, 0};
    if (thread_id < BUCKETS) mine = read_tally(tallies + thread_id);
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
    // Each lane looks up one of the slices that its simdgroup takes, because each look-up waits for memory.
    const uint looked_up = place.lane * place.simdgroups + place.simdgroup;
    const uint2 segments_taken = looked_up < slices ? segment(looked_up, bucket, end) : uint2(0u);
    for (uint i = place.simdgroup; i < slices; i += place.simdgroups) {
      const uint2 places = simd_shuffle(segments_taken, ushort(i / place.simdgroups));
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
    while (sorters * PLACES < found) sorters *= 2;
    ulong mass = 0;
#pragma unroll
    for (uint k = 0; k < PLACES; k++) {
      const uint i = k * sorters + thread_id;
      range.tokens[k] = thread_id < sorters && i < found ? space.tokens[i] : 0;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    sort_tokens<PLACES>(range.tokens, space.tokens, sorters, thread_id, place.lane);
#pragma unroll
    for (uint k = 0; k < PLACES; k++) {
      range.weights[k] = weigher.weight(range.tokens[k]);
      mass += range.weights[k];
      range.masses[k] = mass;
    }
    const ulong before = range.before.mass + threadgroup_scan(mass, space.sums, place).sum - mass;
#pragma unroll
    for (uint k = 0; k < PLACES; k++) range.masses[k] += before;
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
      const ulong sum = by_mass ? range.masses[k] : range.before.count + thread_id * PLACES + k + 1;
      const ulong step = by_mass ? range.weights[k] : 1;
      if (range.tokens[k] == 0 || sum - step >= target || sum < target) continue;
      *space.reached = {range.tokens[k], range.masses[k]};
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const Reached reached = *space.reached;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return reached;
  }

  // The weight of the tokens that are not smaller than `end`, which is in `range` or after it.
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
      target = share_of(kept.total, bits) + 1;
    }
    const Reached reached = row.reach(step != 0, target, range);
    if (step == 0) {
      kept.last = ulong(token_key(reached.token)) << INDEX_BITS;  // and all its ties
      kept.total = row.mass_until(kept.last, range);
    } else if (step == 1) {
      const ulong weight = row.weigher.weight(reached.token);
      const bool out = is_surplus(reached.mass, weight, target, kept.total, row.weigher.octaves(reached.token));
      kept.last = reached.token + (out ? 1 : 0);
      kept.total = reached.mass - (out ? weight : 0);
    } else {
      kept.drawn = reached.token;
    }
  }
  return kept;
}
