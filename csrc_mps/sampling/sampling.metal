// Sampling and filtering of logits in three launches: the maximum; slices sorted, with their running weight; then a search,
// and a draw or the logits that are kept. No step takes much longer for some logits than for others.
#include <metal_stdlib>
#include "common/philox.h"
#include "common/scan.metal.h"
#include "common/token_weight.h"
#include "sampling/ranking.metal.h"
using namespace metal;
using namespace torch_fused;

// The largest key of a row's slices, as the float that has it.
inline float row_maximum(uint largest, threadgroup uint* scratch, Place place) {
  return as_type<float>(key_bits(threadgroup_max(largest, scratch, place)));
}

// A threadgroup a slice: its largest key.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(1024)]]
void sampling_maximum(device const T* logits [[buffer(0)]], device uint* maxima [[buffer(1)]],
                      constant SamplingParams& p [[buffer(2)]], uint group [[threadgroup_position_in_grid]],
                      uint thread_id [[thread_position_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                      uint simdgroup [[simdgroup_index_in_threadgroup]],
                      uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup uint scratch[32];
  const Place place = {lane, simdgroup, simdgroups};
  device const T* row = logits + long(group / p.slices) * p.row_stride;
  const uint first = group % p.slices * SLICE;
  uint largest = 0u;
  for (uint i = first + thread_id; i < min(first + SLICE, p.vocabulary); i += THREADS) {
    largest = max(largest, order_key(as_type<uint>(float(row[i]))));
  }
  largest = threadgroup_max(largest, scratch, place);
  if (thread_id == 0) maxima[group] = largest;
}

// A threadgroup a slice: its tokens in order, their running weight, and a summary.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(1024)]]
void sampling_sort(device const T* logits [[buffer(0)]], device const uint* maxima [[buffer(1)]],
                   device const float* row_parameters [[buffer(2)]], device ulong* sorted [[buffer(3)]],
                   device ulong* masses [[buffer(4)]], device ulong* summaries [[buffer(5)]],
                   constant SamplingParams& p [[buffer(6)]], uint group [[threadgroup_position_in_grid]],
                   uint thread_id [[thread_position_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                   uint simdgroup [[simdgroup_index_in_threadgroup]],
                   uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup ulong tokens[SLICE];
  threadgroup ulong sums[32];
  threadgroup uint scratch[32];
  const Place place = {lane, simdgroup, simdgroups};
  const uint row = group / p.slices;
  device const T* values = logits + long(row) * p.row_stride;
  for (uint i = thread_id; i < SLICE; i += THREADS) {
    const uint index = group % p.slices * SLICE + i;
    tokens[i] = index < p.vocabulary ? make_token(order_key(as_type<uint>(float(values[index]))), index) : 0;
  }
  uint largest = 0u;
  for (uint i = thread_id; i < p.slices; i += THREADS) largest = max(largest, maxima[long(row) * p.slices + i]);
  const TokenFilter filter = row_filter(p, row_parameters, row);
  const Weigher weigher = {row_maximum(largest, scratch, place), filter.scale};
  sort_tokens(tokens, SLICE, thread_id, lane);

  const long first = long(group) * SLICE + 2 * thread_id;
  ulong live = 0, heavy = 0, weights[2];
  for (uint j = 0; j < 2; j++) {
    const ulong token = tokens[2 * thread_id + j];
    sorted[first + j] = token;
    weights[j] = weigher.weight(token);
    live += token != 0 ? 1 : 0;
    heavy += weights[j] >= filter.min_weight ? weights[j] : 0;
  }
  const ulong sum = threadgroup_scan(weights[0] + weights[1], sums, place).sum;
  masses[first] = sum - weights[1];
  masses[first + 1] = sum;
  live = threadgroup_scan(live, sums, place).total;
  heavy = threadgroup_scan(heavy, sums, place).total;
  if (thread_id == 0) {
    summaries[2 * group] = live;
    summaries[2 * group + 1] = heavy;
  }
}

#define WORKSPACE(space)                       \
  threadgroup ulong found[FEW];                \
  threadgroup ulong sums[32];                  \
  threadgroup uint counts[32];                 \
  threadgroup uint ends[2 * MOST_SLICES];      \
  threadgroup Reached reached[1];              \
  threadgroup atomic_uint found_count[1];      \
  const Workspace space = {found, sums, counts, ends, reached, found_count};

inline Ranking row_ranking(device const ulong* sorted, device const ulong* masses, device const ulong* summaries,
                           constant SamplingParams& p, uint row, float scale, threadgroup uint* scratch,
                           uint thread_id, Place place) {
  const long slice = long(row) * p.slices;
  device const ulong* tokens = sorted + slice * SLICE;
  uint largest = 0u, least = 0u;  // the least key as the largest of the inverted ones
  for (uint i = thread_id; i < p.slices; i += THREADS) {
    const uint live = uint(summaries[2 * (slice + i)]);
    if (live == 0u) continue;
    largest = max(largest, token_key(tokens[i * SLICE]));
    least = max(least, ~token_key(tokens[i * SLICE + live - 1]));
  }
  const Weigher weigher = {row_maximum(largest, scratch, place), scale};
  least = ~threadgroup_max(least, scratch, place);
  const Ranking ranking = {tokens, masses + slice * SLICE, summaries + slice * 2, p.slices, least, weigher};
  return ranking;
}

// A threadgroup a row: the token drawn.
[[kernel, max_total_threads_per_threadgroup(1024)]]
void sampling_draw(device const ulong* sorted [[buffer(0)]], device const ulong* masses [[buffer(1)]],
                   device const ulong* summaries [[buffer(2)]], device const float* row_parameters [[buffer(3)]],
                   device const ulong* state [[buffer(4)]], device long* ids [[buffer(5)]],
                   device uchar* valid [[buffer(6)]], constant SamplingParams& p [[buffer(7)]],
                   uint row [[threadgroup_position_in_grid]], uint thread_id [[thread_position_in_threadgroup]],
                   uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                   uint simdgroups [[simdgroups_per_threadgroup]]) {
  WORKSPACE(space)
  const Place place = {lane, simdgroup, simdgroups};
  const TokenFilter filter = row_filter(p, row_parameters, row);
  const Ranking ranking = row_ranking(sorted, masses, summaries, p, row, filter.scale, counts, thread_id, place);
  const Kept kept = apply_filter(ranking, filter, space, thread_id, place);
  uint index = 0u;
  if (kept.total != 0) {
    const ulong seed = p.flags & STATE ? state[0] : p.seed;
    const ulong offset = p.flags & STATE ? state[1] : p.offset;
    const ulong below = isinf(filter.scale) ? 0 : random_below(random_bits(seed, offset, row), kept.total);
    index = token_index(ranking.reach(true, below + 1, kept.live, space, thread_id, place).token);
  }
  if (thread_id == 0) {
    ids[row] = index;
    valid[row] = kept.total != 0 ? 1 : 0;
  }
}

// A threadgroup a slice: its logits that are kept, and -inf in place of the others.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(1024)]]
void filter_logits(device const T* logits [[buffer(0)]], device const ulong* sorted [[buffer(1)]],
                   device const ulong* masses [[buffer(2)]], device const ulong* summaries [[buffer(3)]],
                   device const float* row_parameters [[buffer(4)]], device T* output [[buffer(5)]],
                   constant SamplingParams& p [[buffer(6)]], uint group [[threadgroup_position_in_grid]],
                   uint thread_id [[thread_position_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                   uint simdgroup [[simdgroup_index_in_threadgroup]],
                   uint simdgroups [[simdgroups_per_threadgroup]]) {
  WORKSPACE(space)
  const Place place = {lane, simdgroup, simdgroups};
  const uint row = group / p.slices;
  const TokenFilter filter = row_filter(p, row_parameters, row);
  const Ranking ranking = row_ranking(sorted, masses, summaries, p, row, filter.scale, counts, thread_id, place);
  const Kept kept = apply_filter(ranking, filter, space, thread_id, place);
  for (uint i = thread_id; i < SLICE; i += THREADS) {
    const uint index = group % p.slices * SLICE + i;
    if (index >= p.vocabulary) break;
    const T logit = logits[long(row) * p.row_stride + index];
    const ulong token = make_token(order_key(as_type<uint>(float(logit))), index);
    const bool keep = token >= kept.last && ranking.weigher.weight(token) >= filter.min_weight;
    output[long(row) * p.vocabulary + index] = keep ? logit : T(-INFINITY);
  }
}

#define SAMPLING(name, T)                                                                                          \
  template [[host_name("sampling_maximum_" #name)]] [[kernel]] void sampling_maximum<T>(                           \
      device const T*, device uint*, constant SamplingParams&, uint, uint, uint, uint, uint);                      \
  template [[host_name("sampling_sort_" #name)]] [[kernel]] void sampling_sort<T>(                                 \
      device const T*, device const uint*, device const float*, device ulong*, device ulong*, device ulong*,       \
      constant SamplingParams&, uint, uint, uint, uint, uint);                                                     \
  template [[host_name("filter_logits_" #name)]] [[kernel]] void filter_logits<T>(                                 \
      device const T*, device const ulong*, device const ulong*, device const ulong*, device const float*,         \
      device T*, constant SamplingParams&, uint, uint, uint, uint, uint);
SAMPLING(f32, float)
SAMPLING(f16, half)
SAMPLING(bf16, bfloat)
