// The sampling order of a row: larger logits first, equal ones by index. Each slice of a row is sorted on its own, and
// every `stride`-th token of a slice is a pivot, whose place in the whole row is known. Between two neighbouring pivots
// lie fewer than `stride` tokens a slice, whatever the logits are, so any place in the row is settled by sorting a few.
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
  uint stride;  // tokens from pivot to pivot; slices * stride <= SLICE
  uint flags;
};

constant constexpr uint SLICE = 2048;  // tokens; two a thread
constant constexpr uint THREADS = 1024;
constant constexpr uint ROW_PARAMETERS = 1;  // flags: the filter of each row is in a buffer
constant constexpr uint STATE = 2;           // seed and offset are in a buffer

// A token is its key above its inverted index, so that the order is that of integers, descending. 0 is none.
inline ulong make_token(uint key, uint index) {
  return key == 0u ? 0 : ulong(key) << 32 | ulong(~index);
}
inline uint token_key(ulong token) {
  return uint(token >> 32);
}
inline uint token_index(ulong token) {
  return ~uint(token);
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

// Sorts `size` tokens, a power of two up to twice the threads, largest first: Batcher's bitonic network. Comparisons
// over up to 32 tokens stay within what one simdgroup sorts, and need no barrier of the threadgroup.
inline void sort_tokens(threadgroup ulong* tokens, uint size, uint thread_id) {
  for (uint width = 2; width <= size; width *= 2) {
    for (uint distance = width / 2; distance > 0; distance /= 2) {
      if (thread_id < size / 2) {
        const uint first = 2 * thread_id - (thread_id & (distance - 1));
        const ulong a = tokens[first], b = tokens[first + distance];
        if ((a < b) == ((first & width) == 0)) {
          tokens[first] = b;
          tokens[first + distance] = a;
        }
      }
      const uint next = distance > 1 ? distance / 2 : width;
      if (max(distance, next) > 32) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
      } else {
        simdgroup_barrier(mem_flags::mem_threadgroup);
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
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

constant constexpr uint NO_PIVOT = 0xffffffffu;

struct Reached {
  ulong token;
  ulong sum;  // up to and with the token
};

// Threadgroup memory for the search of a row.
struct Workspace {
  threadgroup ulong* tokens;    // SLICE
  threadgroup ulong* sums;      // 32
  threadgroup uint* maxima;     // 32
  threadgroup uint* pivots;     // 2
  threadgroup Reached* reached;
  threadgroup atomic_uint* count;
};

// One row as the launches before have left it.
struct Ranking {
  device const ulong* tokens;        // slices of SLICE, each sorted
  device const ulong* masses;        // running weight within each slice
  device const ulong* summaries;     // two a slice: its tokens that can be drawn; weight of those that min_p keeps
  device const uint* pivot_counts;   // tokens of the row before each pivot
  device const ulong* pivot_masses;  // and their weight
  uint slices;
  uint stride;
  Weigher weigher;

  // The first token of the row up to and with which there are `target` tokens, or, by_mass, that much weight.
  Reached reach(bool by_mass, ulong target, Workspace space, uint thread_id, Place place) const {
    // The last pivot before the place and the first one after it.
    uint below = 0u, above = 0u, below_pivot = 0u, above_pivot = 0u;
    for (uint i = thread_id; i < slices * (SLICE / stride); i += THREADS) {
      const uint count = pivot_counts[i];
      if (count == NO_PIVOT) continue;
      if ((by_mass ? pivot_masses[i] : ulong(count)) < target) {
        if (count + 1 > below) {
          below = count + 1;
          below_pivot = i;
        }
      } else if (~count > above) {
        above = ~count;
        above_pivot = i;
      }
    }
    const uint nearest_below = threadgroup_max(below, space.maxima, place);
    const uint nearest_above = threadgroup_max(above, space.maxima, place);
    if (below == nearest_below) space.pivots[0] = below_pivot;
    if (above == nearest_above && above != 0u) space.pivots[1] = above_pivot;
    if (thread_id == 0) atomic_store_explicit(space.count, 0u, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // What lies between them, in any order, then sorted.
    const ulong first = tokens[space.pivots[0] * stride];
    const ulong end = nearest_above != 0u ? tokens[space.pivots[1] * stride] : 0;
    for (uint i = thread_id; i < slices; i += THREADS) {
      device const ulong* slice = tokens + i * SLICE;
      const uint from = tokens_before(slice, first), to = tokens_before(slice, end);
      uint slot = atomic_fetch_add_explicit(space.count, to - from, memory_order_relaxed);
      for (uint j = from; j < to; j++) space.tokens[slot++] = slice[j];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const uint found = atomic_load_explicit(space.count, memory_order_relaxed);
    uint size = 2;
    while (size < found) size *= 2;
    for (uint i = found + thread_id; i < size; i += THREADS) space.tokens[i] = 0;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    sort_tokens(space.tokens, size, thread_id);

    ulong pair[2] = {0, 0}, values[2] = {0, 0};
    for (uint j = 0; j < 2; j++) {
      if (2 * thread_id + j < size) pair[j] = space.tokens[2 * thread_id + j];
      values[j] = by_mass ? weigher.weight(pair[j]) : pair[j] != 0 ? 1 : 0;
    }
    const ulong before = by_mass ? pivot_masses[space.pivots[0]] : ulong(nearest_below - 1);
    ulong sum = before + threadgroup_scan(values[0] + values[1], space.sums, place).sum - values[0] - values[1];
    for (uint j = 0; j < 2; j++) {
      if (sum < target && sum + values[j] >= target) {
        space.reached->token = pair[j];
        space.reached->sum = sum + values[j];
      }
      sum += values[j];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const Reached reached = {space.reached->token, space.reached->sum};
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
  Kept kept = {1, threadgroup_scan(mass, space.sums, place).total};
  if (live == 0) return kept;
  if (filter.top_k != 0u && filter.top_k < live) {
    const ulong kth = row.reach(false, filter.top_k, space, thread_id, place).token;
    kept.last = ulong(token_key(kth)) << 32;  // and all its ties
    kept.total = row.mass_before(kept.last, space, thread_id, place);
  }
  if (filter.top_p < kNoTopP) {
    const Reached edge = row.reach(true, top_p_target(kept.total, filter.top_p), space, thread_id, place);
    kept.last = edge.token;
    kept.total = edge.sum;
  }
  kept.total = min(kept.total, heavy);
  return kept;
}
