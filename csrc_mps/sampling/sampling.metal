// Sampling and filtering of logits in three launches: the maximum; slices sorted, with their running weight; then a search,
// and a draw or the logits that are kept. No step takes much longer for some logits than for others.
#include <metal_stdlib>
#include "common/philox.h"
#include "common/scan.metal.h"
#include "common/token_weight.h"
#include "sampling/ranking.metal.h"
using namespace metal;
using namespace torch_fused;

// The logits of a slice, eight a thread, NaN behind the end of the row.
template <typename T>
inline void load_slice(device const T* row, uint slice, uint vocabulary, uint thread_id, thread float* logits) {
  const uint first = slice * SLICE + thread_id;
#pragma unroll
  for (uint j = 0; j < PER_THREAD; j++) {
    const uint index = first + j * SLICE_THREADS;
    logits[j] = index < vocabulary ? float(row[index]) : NAN;
  }
}

// A threadgroup a slice: its largest key.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(256)]]
void sampling_maximum(device const T* logits [[buffer(0)]], device uint* maxima [[buffer(1)]],
                      constant SamplingParams& p [[buffer(2)]], uint group [[threadgroup_position_in_grid]],
                      uint thread_id [[thread_position_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                      uint simdgroup [[simdgroup_index_in_threadgroup]],
                      uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup uint scratch[32];
  const Place place = {lane, simdgroup, simdgroups};
  float values[PER_THREAD];
  load_slice(logits + long(group / p.slices) * p.row_stride, group % p.slices, p.vocabulary, thread_id, values);
  uint largest = 0u;
#pragma unroll
  for (uint j = 0; j < PER_THREAD; j++) largest = max(largest, order_key(as_type<uint>(values[j])));
  largest = threadgroup_max(largest, scratch, place);
  if (thread_id == 0) maxima[group] = largest;
}

// A threadgroup a slice: its tokens in order, their running weight, and a summary.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(256)]]
void sampling_sort(device const T* logits [[buffer(0)]], device const uint* maxima [[buffer(1)]],
                   device const float* row_parameters [[buffer(2)]], device ulong* sorted [[buffer(3)]],
                   device ulong* masses [[buffer(4)]], device Summary* summaries [[buffer(5)]],
                   constant SamplingParams& p [[buffer(6)]], uint group [[threadgroup_position_in_grid]],
                   uint thread_id [[thread_position_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                   uint simdgroup [[simdgroup_index_in_threadgroup]],
                   uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup ulong exchange[SLICE];
  threadgroup ulong sums[32];
  const Place place = {lane, simdgroup, simdgroups};
  const uint row = group / p.slices;
  float values[PER_THREAD];
  load_slice(logits + long(row) * p.row_stride, group % p.slices, p.vocabulary, thread_id, values);
  ulong tokens[PER_THREAD], weights[PER_THREAD];
#pragma unroll
  for (uint j = 0; j < PER_THREAD; j++) {
    const uint index = group % p.slices * SLICE + j * SLICE_THREADS + thread_id;
    tokens[j] = make_token(order_key(as_type<uint>(values[j])), index);
  }
  uint largest = 0u;
  for (uint i = lane; i < p.slices; i += 32) largest = max(largest, maxima[long(row) * p.slices + i]);
  const TokenFilter filter = row_filter(p, row_parameters, row);
  const Weigher weigher = {as_type<float>(key_bits(simd_max(largest))), filter.scale};
  sort_tokens(tokens, exchange, SLICE_THREADS, thread_id, lane);

  ulong live = 0, heavy = 0, mass = 0;
#pragma unroll
  for (uint j = 0; j < PER_THREAD; j++) {
    weights[j] = weigher.weight(tokens[j]);
    live += tokens[j] != 0 ? 1 : 0;
    heavy += weights[j] >= filter.min_weight ? weights[j] : 0;
    mass += weights[j];
  }
  const Running running = threadgroup_scan(mass, sums, place);
  live = threadgroup_scan(live, sums, place).total;
  heavy = threadgroup_scan(heavy, sums, place).total;
  if (thread_id == 0) {
    summaries[group].live = live;
    summaries[group].mass = running.total;
    summaries[group].heavy = heavy;
    summaries[group].first = tokens[0];
    if (live == 0) summaries[group].last = ~ulong(0);
  }
  mass = running.sum - mass;
#pragma unroll
  for (uint j = 0; j < PER_THREAD; j++) {
    mass += weights[j];
    const long slot = long(group) * SLICE + j * SLICE_THREADS + thread_id;
    sorted[slot] = tokens[j];
    masses[slot] = mass;
    if (PER_THREAD * thread_id + j + 1 == live) summaries[group].last = tokens[j];
  }
}

#define SEARCH_ROW(ranking)                                                                                         \
  threadgroup ulong found[FEW];                                                                                     \
  threadgroup ulong sums[32];                                                                                       \
  threadgroup ulong pivots[32];                                                                                     \
  threadgroup Tally tallies[32];                                                                                    \
  threadgroup uint from[MOST_SLICES];                                                                               \
  threadgroup uint to[MOST_SLICES];                                                                                 \
  threadgroup Reached reached[1];                                                                                   \
  threadgroup atomic_uint found_count[1];                                                                           \
  const long first_slice = long(row) * p.slices;                                                                    \
  Ranking ranking;                                                                                                  \
  ranking.tokens = sorted + first_slice * SLICE;                                                                    \
  ranking.masses = masses + first_slice * SLICE;                                                                    \
  ranking.summaries = summaries + first_slice;                                                                      \
  ranking.slices = p.slices;                                                                                        \
  ranking.space = {found, sums, pivots, tallies, from, to, reached, found_count};                                   \
  ranking.thread_id = thread_id;                                                                                    \
  ranking.place = {lane, simdgroup, simdgroups};

// A threadgroup a row: the token drawn.
[[kernel, max_total_threads_per_threadgroup(768)]]
void sampling_draw(device const ulong* sorted [[buffer(0)]], device const ulong* masses [[buffer(1)]],
                   device const Summary* summaries [[buffer(2)]], device const float* row_parameters [[buffer(3)]],
                   device const ulong* state [[buffer(4)]], device long* ids [[buffer(5)]],
                   device uchar* valid [[buffer(6)]], constant SamplingParams& p [[buffer(7)]],
                   uint row [[threadgroup_position_in_grid]], uint thread_id [[thread_position_in_threadgroup]],
                   uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                   uint simdgroups [[simdgroups_per_threadgroup]]) {
  SEARCH_ROW(ranking)
  const TokenFilter filter = row_filter(p, row_parameters, row);
  ranking.read_summaries(filter.scale);
  Range range;
  const Kept kept = apply_filter(ranking, filter, range);
  uint index = 0u;
  if (kept.total != 0) {
    const ulong seed = p.flags & STATE ? state[0] : p.seed;
    const ulong offset = p.flags & STATE ? state[1] : p.offset;
    const ulong below = isinf(filter.scale) ? 0 : random_below(random_bits(seed, offset, row), kept.total);
    index = token_index(ranking.reach(true, below + 1, range).token);
  }
  if (thread_id == 0) {
    ids[row] = index;
    valid[row] = kept.total != 0 ? 1 : 0;
  }
}

// A threadgroup a slice: its logits that are kept, and -inf in place of the others.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(768)]]
void filter_logits(device const T* logits [[buffer(0)]], device const ulong* sorted [[buffer(1)]],
                   device const ulong* masses [[buffer(2)]], device const Summary* summaries [[buffer(3)]],
                   device const float* row_parameters [[buffer(4)]], device T* output [[buffer(5)]],
                   constant SamplingParams& p [[buffer(6)]], uint group [[threadgroup_position_in_grid]],
                   uint thread_id [[thread_position_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                   uint simdgroup [[simdgroup_index_in_threadgroup]],
                   uint simdgroups [[simdgroups_per_threadgroup]]) {
  const uint row = group / p.slices;
  SEARCH_ROW(ranking)
  const TokenFilter filter = row_filter(p, row_parameters, row);
  ranking.read_summaries(filter.scale);
  Range range;
  const Kept kept = apply_filter(ranking, filter, range);
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
      device const T*, device const uint*, device const float*, device ulong*, device ulong*, device Summary*,     \
      constant SamplingParams&, uint, uint, uint, uint, uint);                                                     \
  template [[host_name("filter_logits_" #name)]] [[kernel]] void filter_logits<T>(                                 \
      device const T*, device const ulong*, device const ulong*, device const Summary*, device const float*,       \
      device T*, constant SamplingParams&, uint, uint, uint, uint, uint);
SAMPLING(f32, float)
SAMPLING(f16, half)
SAMPLING(bf16, bfloat)
