// The sampling order of a row: larger logits first, equal ones by index. Each slice of a row is sorted on its own. A place
// in the row is found by narrowing the range of tokens that it lies in, whatever the logits are: each simdgroup counts
// what precedes another token of the range, which leaves a 33rd of it; the few tokens of the last range are sorted.
#pragma once
#include <metal_stdlib>
#include "common/scan.metal.h"
#include "common/token_weight.h"
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

constant constexpr uint SLICE = 2048;  // tokens; two a thread
constant constexpr uint THREADS = 1024;
constant constexpr uint MOST_SLICES = 512;
constant constexpr uint FEW = 512;  // tokens that are sorted to settle a place
constant constexpr uint ROW_PARAMETERS = 1;  // flags: the filter of each row is in a buffer
constant constexpr uint STATE = 2;           // seed and offset are in a buffer

// A token is its key above its inverted index, so that the order is that of integers, descending. 0 is none.
constant constexpr uint INDEX_BITS = 20;
constant constexpr uint LAST_INDEX = (1u << INDEX_BITS) - 1u;

inline ulong first_token(uint key) {
  return ulong(key) << INDEX_BITS | LAST_INDEX;
}
inline ulong make_token(uint key, uint index) {
  return key == 0u ? 0 : first_token(key) - index;
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

constant constexpr uint SORTED_AT_ONCE = 64;  // tokens, by a simdgroup in registers; two a thread

// The larger of two tokens first, or the smaller.
inline void order_pair(thread ulong& a, thread ulong& b, bool larger_first) {
  const ulong other = a;
  const bool swap = (a < b) == larger_first;
  a = swap ? b : a;
  b = swap ? other : b;
}

// The last steps of a merge, with the token `distance` away, then half as far and so on: those within a simdgroup.
inline void merge_in_simdgroup(thread ulong* pair, uint distance, bool larger_first, uint lane) {
  for (; distance > 1; distance /= 2) {
    const ushort other_lane = distance / 2;
    const bool keeps_larger = ((lane & other_lane) == 0) == larger_first;
#pragma unroll
    for (uint j = 0; j < 2; j++) {
      const ulong other = as_type<ulong>(simd_shuffle_xor(as_type<uint2>(pair[j]), other_lane));
      pair[j] = (other > pair[j]) == keeps_larger ? other : pair[j];
    }
  }
  order_pair(pair[0], pair[1], larger_first);
}

// Sorts `size` tokens, a power of two from SORTED_AT_ONCE to twice the threads, largest first: Batcher's bitonic
// network. Thread i has tokens 2 i and 2 i + 1; what a simdgroup has needs no threadgroup memory.
inline void sort_tokens(threadgroup ulong* tokens, uint size, uint thread_id, uint lane) {
  const uint mine = 2 * thread_id;
  const bool has_tokens = mine < size;
  ulong pair[2];
  if (has_tokens) {
    pair[0] = tokens[mine];
    pair[1] = tokens[mine + 1];
    for (uint width = 2; width <= SORTED_AT_ONCE; width *= 2) {
      merge_in_simdgroup(pair, width / 2, (mine & width) == 0, lane);
    }
    tokens[mine] = pair[0];
    tokens[mine + 1] = pair[1];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint width = 2 * SORTED_AT_ONCE; width <= size; width *= 2) {
    for (uint distance = width / 2; distance >= SORTED_AT_ONCE; distance /= 2) {
      if (has_tokens) {
        const uint first = mine - (thread_id & (distance - 1));
        const ulong a = tokens[first], b = tokens[first + distance];
        if ((a < b) == ((first & width) == 0)) {
          tokens[first] = b;
          tokens[first + distance] = a;
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (has_tokens) {
      pair[0] = tokens[mine];
      pair[1] = tokens[mine + 1];
      merge_in_simdgroup(pair, SORTED_AT_ONCE / 2, (mine & width) == 0, lane);
      tokens[mine] = pair[0];
      tokens[mine + 1] = pair[1];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// How many of a sorted slice's tokens precede `token`.
inline uint tokens_before(device const ulong* slice, ulong token) {
  uint low = 0, high = SLICE;
  while (low < high) {
    const uint middle = (low + high) / 2;
    if (slice[middle] > token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

struct Reached {
  ulong token;
  ulong sum;  // up to and with the token
};

// Threadgroup memory for the search of a row.
struct Workspace {
  threadgroup ulong* tokens;  // FEW
  threadgroup ulong* sums;    // 32
  threadgroup uint* counts;   // 32
  threadgroup uint* ends;     // 2 * MOST_SLICES
  threadgroup Reached* reached;
  threadgroup atomic_uint* count;
};

// Tokens, and their number or weight.
struct Tally {
  uint count;
  ulong sum;
};

// One row as the launches before have left it.
struct Ranking {
  device const ulong* tokens;     // slices of SLICE, each sorted
  device const ulong* masses;     // running weight within each slice
  device const ulong* summaries;  // two a slice: its tokens that can be drawn; weight of those that min_p keeps
  uint slices;
  uint least_key;  // of a token that can be drawn
  Weigher weigher;

  // What of the row precedes `token`, by one simdgroup.
  Tally tally_before(bool by_mass, ulong token, Place place) const {
    Tally tally = {0u, 0};
    for (uint i = place.lane; i < slices; i += 32) {
      const uint before = tokens_before(tokens + i * SLICE, token);
      tally.count += before;
      if (by_mass && before != 0u) tally.sum += masses[i * SLICE + before - 1];
    }
    tally.count = simd_sum(tally.count);
    for (ushort distance = 16; distance > 0; distance /= 2) {
      tally.sum += as_type<ulong>(simd_shuffle_xor(as_type<uint2>(tally.sum), distance));
    }
    if (!by_mass) tally.sum = tally.count;
    return tally;
  }

  // The first token of the row up to and with which there are `target` of its `live` tokens, or, by_mass, that weight.
  Reached reach(bool by_mass, ulong target, uint live, Workspace space, uint thread_id, Place place) const {
    // The place is among the tokens first .. last + 1, in falling order; `before` precede them.
    ulong first = first_token(order_key(as_type<uint>(weigher.maximum)));
    ulong last = (ulong(least_key) << INDEX_BITS) - 1;
    Tally before = {0u, 0};
    uint until = live;  // tokens that precede `last`
    while (until - before.count > FEW) {
      const ulong step = (first - last) / (place.simdgroups + 1);
      const Tally mine = tally_before(by_mass, first - step * (place.simdgroup + 1), place);
      if (place.lane == 0) {
        space.counts[place.simdgroup] = mine.count;
        space.sums[place.simdgroup] = mine.sum;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      // How many of the simdgroups' tokens lie before the place or at it.
      const uint passed = simd_sum(place.lane < place.simdgroups && space.sums[place.lane] < target ? 1u : 0u);
      if (passed < place.simdgroups) {
        last = first - step * (passed + 1);
        until = space.counts[passed];
      }
      if (passed > 0u) {
        first -= step * passed;
        before = {space.counts[passed - 1], space.sums[passed - 1]};
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }

    // They are collected in any order, then sorted.
    for (uint i = thread_id; i < 2 * slices; i += THREADS) {
      space.ends[i] = tokens_before(tokens + i / 2 * SLICE, i % 2 == 0 ? first : last);
    }
    if (thread_id == 0) atomic_store_explicit(space.count, 0u, memory_order_relaxed);
    const uint found = until - before.count;
    uint size = SORTED_AT_ONCE;
    while (size < found) size *= 2;
    for (uint i = found + thread_id; i < size; i += THREADS) space.tokens[i] = 0;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = place.simdgroup; i < slices; i += place.simdgroups) {
      const uint from = space.ends[2 * i], to = space.ends[2 * i + 1];
      if (from == to) continue;
      uint slot = 0u;
      if (place.lane == 0) slot = atomic_fetch_add_explicit(space.count, to - from, memory_order_relaxed);
      slot = simd_broadcast_first(slot);
      for (uint j = from + place.lane; j < to; j += 32) space.tokens[slot + j - from] = tokens[i * SLICE + j];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    sort_tokens(space.tokens, size, thread_id, place.lane);

    const ulong token = thread_id < size ? space.tokens[thread_id] : 0;
    const ulong value = by_mass ? weigher.weight(token) : token != 0 ? 1 : 0;
    const ulong sum = before.sum + threadgroup_scan(value, space.sums, place).sum;
    if (sum - value < target && sum >= target) *space.reached = {token, sum};
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const Reached reached = *space.reached;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return reached;
  }

  // The weight of the row's tokens that precede `token`.
  ulong mass_before(ulong token, Workspace space, uint thread_id, Place place) const {
    ulong mass = 0;
    for (uint i = thread_id; i < slices; i += THREADS) {
      const uint count = tokens_before(tokens + i * SLICE, token);
      if (count != 0u) mass += masses[i * SLICE + count - 1];
    }
    return threadgroup_scan(mass, space.sums, place).total;
  }
};

// What a filter keeps of a row.
struct Kept {
  ulong last;   // the last token in the order; 1 keeps all
  ulong total;  // weight of the tokens kept; 0: nothing can be drawn
  uint live;    // the row's tokens that can be drawn at all
};

inline Kept apply_filter(Ranking row, TokenFilter filter, Workspace space, uint thread_id, Place place) {
  ulong live = 0, heavy = 0, mass = 0;
  for (uint i = thread_id; i < row.slices; i += THREADS) {
    live += row.summaries[2 * i];
    heavy += row.summaries[2 * i + 1];
    mass += row.masses[i * SLICE + SLICE - 1];
  }
  live = threadgroup_scan(live, space.sums, place).total;
  heavy = threadgroup_scan(heavy, space.sums, place).total;
  Kept kept = {1, threadgroup_scan(mass, space.sums, place).total, uint(live)};
  if (live == 0) return kept;
  if (filter.top_k != 0u && filter.top_k < live) {
    const ulong kth = row.reach(false, filter.top_k, kept.live, space, thread_id, place).token;
    kept.last = ulong(token_key(kth)) << INDEX_BITS;  // and all its ties
    kept.total = row.mass_before(kept.last, space, thread_id, place);
  }
  if (filter.top_p < kNoTopP) {
    const Reached edge = row.reach(true, top_p_target(kept.total, filter.top_p), kept.live, space, thread_id, place);
    kept.last = edge.token;
    kept.total = edge.sum;
  }
  kept.total = min(kept.total, heavy);
  return kept;
}
