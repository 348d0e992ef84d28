// The sampling order of a row: larger logits first, equal ones by index. Each slice of a row is sorted on its own. A place
// in the row is found by narrowing the range of tokens that it lies in, whatever the logits are: each simdgroup counts
// what precedes another token of the range, which leaves a 33rd of it; the few tokens of the last range are sorted.
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

constant constexpr uint SLICE = 2048;  // tokens
constant constexpr uint SLICE_THREADS = SLICE / PER_THREAD;
constant constexpr uint THREADS = 768;  // that search a row: with more, too few registers for loads at once
constant constexpr uint MOST_SLICES = 512;
constant constexpr uint FEW = 512;  // tokens that are sorted to settle a place
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
  ulong weight(ulong token) const {
    if (token == 0) return 0;
    return token_weight(steps_below(maximum, as_type<float>(key_bits(token_key(token))), scale));
  }
};

// Values in a buffer nobody could check without waiting for the device: they are clamped.
inline TokenFilter row_filter(constant SamplingParams& p, device const float* row_parameters, uint row) {
  if (!(p.flags & ROW_PARAMETERS)) return token_filter(p.scale, p.top_k, p.top_p, p.min_p);
  device const float* values = row_parameters + 4 * row;
  const float scale = values[0] >= 0.0f ? values[0] : 0.0f;
  return token_filter(scale, clamp(values[1], 0.0f, 1048576.0f), clamp(values[2], 0.0f, 1.0f),
                      clamp(values[3], 0.0f, 1.0f));
}

// What is known of a sorted slice.
struct Summary {
  ulong live;   // tokens that can be drawn
  ulong mass;   // their weight
  ulong heavy;  // the weight of those that min_p keeps
  ulong first;
  ulong last;  // of the tokens that can be drawn; of none, larger than any
};

// Tokens, and their weight.
struct Tally {
  ulong count;
  ulong mass;
};

struct Reached {
  ulong token;
  ulong mass;  // of the row up to and with it
};

// Threadgroup memory for the search of a row.
struct Workspace {
  threadgroup ulong* tokens;  // FEW
  threadgroup ulong* sums;    // 32
  threadgroup ulong* pivots;  // 32, and what precedes each
  threadgroup Tally* tallies;
  threadgroup uint* from;     // of each slice: the places of the range
  threadgroup uint* to;
  threadgroup Reached* reached;
  threadgroup atomic_uint* count;
};

// The last range that was sorted: a token a thread, from the first on.
struct Range {
  ulong token;    // 0 for a thread that has none
  ulong mass;     // of the row up to and with that token
  ulong weight;
  Tally before;   // what precedes the range
  Tally until;    // and with it
  ulong last;     // all tokens beyond this one, back to `before`, are in the range
};

// One row as the launches before have left it, seen by one thread of those that search it.
struct Ranking {
  device const ulong* tokens;       // slices of SLICE, each sorted
  device const ulong* masses;       // the running weight within each slice
  device const Summary* summaries;  // of the slices
  uint slices;
  Weigher weigher;
  Tally live;     // of all slices
  ulong heavy;
  ulong first;    // the row's first token
  ulong last;     // and its last that can be drawn
  uint busiest;   // the slice with the most tokens that can be drawn
  uint most;      // their number
  Workspace space;
  uint thread_id;
  Place place;

  // Every simdgroup adds the summaries up for itself.
  void read_summaries(float scale) {
    live = {0, 0};
    heavy = first = last = 0;
    most = 0u;
#pragma unroll 4
    for (uint i = place.lane; i < slices; i += 32) {
      const Summary summary = summaries[i];
      live.count += summary.live;
      live.mass += summary.mass;
      heavy += summary.heavy;
      first = max(first, summary.first);
      last = max(last, ~summary.last);
      most = max(most, uint(summary.live) * MOST_SLICES + i);
    }
    live = {simd_sum(uint(live.count)), simd_total(live.mass)};
    heavy = simd_total(heavy);
    first = simd_largest(first);
    last = ~simd_largest(last);
    most = simd_max(most);
    busiest = most % MOST_SLICES;
    most /= MOST_SLICES;
    weigher = {as_type<float>(key_bits(token_key(first))), scale};
  }

  uint at(uint slice, uint place_in_slice) const {
    return slice * SLICE + slot_of(place_in_slice, SLICE_THREADS);
  }

  // Of each slice, all that can be drawn.
  void whole_row() const {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = thread_id; i < slices; i += THREADS) {
      space.from[i] = 0u;
      space.to[i] = uint(summaries[i].live);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  // What of the row precedes `token`, which is in the range; of N slices a lane, in `before`. By each simdgroup.
  // Four slices at once, and no load behind a condition, because each step waits for memory.
  template <uint N>
  Tally tally_before(ulong token, thread uint* before) const {
    Tally tally = {0, 0};
#pragma unroll
    for (uint chunk = 0; chunk < N; chunk += 4) {
      uint slice[4], high[4], widest = 0u;
#pragma unroll
      for (uint n = 0; n < 4; n++) {
        slice[n] = min(place.lane + 32 * (chunk + n), slices - 1);
        before[chunk + n] = space.from[slice[n]];
        high[n] = space.to[slice[n]];
        widest = max(widest, high[n] - before[chunk + n]);
      }
      for (widest = simd_max(widest); widest > 0u; widest /= 2) {
        ulong probe[4];
#pragma unroll
        for (uint n = 0; n < 4; n++) {
          probe[n] = tokens[at(slice[n], min((before[chunk + n] + high[n]) / 2, SLICE - 1))];
        }
#pragma unroll
        for (uint n = 0; n < 4; n++) {
          const uint middle = (before[chunk + n] + high[n]) / 2;
          const bool is_open = before[chunk + n] < high[n];
          before[chunk + n] = is_open && probe[n] > token ? middle + 1 : before[chunk + n];
          high[n] = is_open && probe[n] <= token ? middle : high[n];
        }
      }
      ulong mass[4];
#pragma unroll
      for (uint n = 0; n < 4; n++) mass[n] = masses[at(slice[n], max(before[chunk + n], 1u) - 1)];
#pragma unroll
      for (uint n = 0; n < 4; n++) {
        const bool counts = place.lane + 32 * (chunk + n) < slices;
        tally.count += counts ? before[chunk + n] : 0u;
        tally.mass += counts && before[chunk + n] != 0u ? mass[n] : 0;
      }
    }
    return {simd_sum(uint(tally.count)), simd_total(tally.mass)};
  }

  // Narrows the range to FEW tokens around the place up to and with which there are `target` tokens, or, by_mass, that
  // weight: those after `range.last`, and behind what is `range.before`.
  template <uint N>
  void narrow(bool by_mass, ulong target, thread Range& range) const {
    ulong top = first;  // the range's first token, or one before it
    bool is_first = true;
    while (range.until.count - range.before.count > FEW) {
      // Tokens of one slice divide the row well unless the slices differ; then the range itself is divided.
      const uint share = place.simdgroup + 1, shares = place.simdgroups + 1;
      const ulong pivot = is_first ? tokens[at(busiest, most * share / shares)]
                                   : top - (top - range.last) / shares * share;
      is_first = false;
      uint before[N];
      const Tally tally = tally_before<N>(pivot, before);
      if (place.lane == 0) {
        space.pivots[place.simdgroup] = pivot;
        space.tallies[place.simdgroup] = tally;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      // How many of the pivots lie before the place or at it.
      const bool has_pivot = place.lane < place.simdgroups;
      const Tally other = space.tallies[has_pivot ? place.lane : 0u];
      const uint passed = simd_sum(has_pivot && (by_mass ? other.mass : other.count) < target ? 1u : 0u);
      if (passed < place.simdgroups) {
        range.last = space.pivots[passed];
        range.until = space.tallies[passed];
        if (place.simdgroup == passed) set_ends<N>(space.to, before);
      }
      // Few tokens are left as they are: a range from the row's first token on serves for what comes next too.
      if (passed > 0u && range.until.count - range.before.count > FEW) {
        top = space.pivots[passed - 1];
        range.before = space.tallies[passed - 1];
        if (place.simdgroup == passed - 1) set_ends<N>(space.from, before);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
  }

  template <uint N>
  void set_ends(threadgroup uint* ends, thread const uint* places) const {
#pragma unroll
    for (uint n = 0; n < N; n++) {
      if (place.lane + 32 * n < slices) ends[place.lane + 32 * n] = places[n];
    }
  }

  // Sorts the tokens of the range, collected in any order.
  void sort_range(thread Range& range) const {
    const uint found = uint(range.until.count - range.before.count);
    const uint sorters = found > 32 * PER_THREAD ? FEW / PER_THREAD : 32u;
    if (thread_id == 0) atomic_store_explicit(space.count, 0u, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = place.simdgroup; i < slices; i += place.simdgroups) {
      const uint from = space.from[i], to = space.to[i];
      if (from == to) continue;
      uint slot = 0u;
      if (place.lane == 0) slot = atomic_fetch_add_explicit(space.count, to - from, memory_order_relaxed);
      slot = simd_broadcast_first(slot);
      for (uint j = from + place.lane; j < to; j += 32) space.tokens[slot + j - from] = tokens[at(i, j)];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
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
    range.token = thread_id < found ? space.tokens[slot_of(thread_id, sorters)] : 0;
    range.weight = weigher.weight(range.token);
    range.mass = range.before.mass + threadgroup_scan(range.weight, space.sums, place).sum;
  }

  // The token up to and with which there are `target` tokens, or, by_mass, that weight; 1 <= target <= all.
  Reached reach(bool by_mass, ulong target, thread Range& range) const {
    const bool is_in_range = by_mass ? range.before.mass < target && target <= range.until.mass
                                     : range.before.count < target && target <= range.until.count;
    if (!is_in_range) {
      range.before = {0, 0};
      range.until = live;
      range.last = last - 1;
      whole_row();
      if (slices <= 32 * 4) {
        narrow<4>(by_mass, target, range);
      } else {
        narrow<MOST_SLICES / 32>(by_mass, target, range);
      }
      sort_range(range);
    }
    const ulong sum = by_mass ? range.mass : range.before.count + thread_id + 1;
    const ulong step = by_mass ? range.weight : 1;
    if (range.token != 0 && sum - step < target && sum >= target) *space.reached = {range.token, range.mass};
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const Reached reached = *space.reached;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return reached;
  }

  // The weight of the tokens that are not smaller than `end`, of which none is behind `range`, or else the row is searched.
  ulong mass_until(ulong end, Range range) const {
    if (end > range.last) {
      return range.before.mass + threadgroup_scan(range.token >= end ? range.weight : 0, space.sums, place).total;
    }
    ulong mass = 0;
    for (uint i = thread_id; i < slices; i += THREADS) {
      uint low = 0u, high = uint(summaries[i].live);
      while (low < high) {
        const uint middle = (low + high) / 2;
        if (tokens[at(i, middle)] >= end) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      if (low != 0u) mass += masses[at(i, low - 1)];
    }
    return threadgroup_scan(mass, space.sums, place).total;
  }
};

// What a filter keeps of a row.
struct Kept {
  ulong last;   // tokens that are not smaller
  ulong total;  // their weight; 0: nothing can be drawn
};

inline Kept apply_filter(Ranking row, TokenFilter filter, thread Range& range) {
  range = {0, 0, 0, {0, 0}, {0, 0}, 0};
  Kept kept = {1, row.live.mass};
  if (row.live.count == 0) return kept;
  if (filter.top_k != 0u && filter.top_k < row.live.count) {
    const ulong kth = row.reach(false, filter.top_k, range).token;
    kept.last = ulong(token_key(kth)) << INDEX_BITS;  // and all its ties
    kept.total = row.mass_until(kept.last, range);
  }
  if (filter.top_p < kNoTopP) {
    const Reached edge = row.reach(true, top_p_target(kept.total, filter.top_p), range);
    kept.last = edge.token;
    kept.total = edge.mass;
  }
  kept.total = min(kept.total, row.heavy);
  return kept;
}
