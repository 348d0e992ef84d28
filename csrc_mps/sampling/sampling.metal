// Sampling and filtering of logits in three launches: a survey of each row, the maxima of its slices and a sample of its
// tokens; slices divided into buckets, which the sample has given; then a search, and a draw or the logits that are kept.
// No step takes much longer for some logits than for others.
#include <metal_stdlib>
#include "common/kernel.metal.h"
#include "common/philox.h"
#include "common/scan.metal.h"
#include "sampling/ranking.metal.h"
using namespace metal;
using namespace torch_fused;

// The logits of a slice, eight per thread, NaN after the end of the row.
template <typename T>
inline void load_slice(device const T* row, uint slice, uint vocabulary, uint thread_id, thread float* logits) {
  const uint first = slice * SLICE + thread_id;
#pragma unroll
  for (uint j = 0; j < PER_THREAD; j++) {
    const uint index = first + j * SLICE_THREADS;
    logits[j] = index < vocabulary ? float(row[index]) : NAN;
  }
}

constant constexpr uint SAMPLED = 4;  // tokens that each thread takes into the sample
constant constexpr uint SAMPLE = SAMPLED * BUCKETS;

// An index in each SAMPLE-th of a row, at a place in it that is as good as random.
inline uint sampled_index(uint i, uint vocabulary) {
  return uint(ulong(i << 10 | (i * 2654435761u) >> 22) * vocabulary / (SAMPLE << 10));
}

// A threadgroup a slice: its largest key. And one a row that sorts a sample of it, of which every fourth token ends a
// bucket, and clears the row's tallies.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(256)]]
void sampling_survey(device const T* logits [[buffer(0)]], device uint* maxima [[buffer(1)]],
                     device ulong* splitters [[buffer(2)]], device uint* tallies [[buffer(3)]],
                     constant SamplingParams& p [[buffer(4)]],
                     uint group [[threadgroup_position_in_grid]], uint thread_id [[thread_position_in_threadgroup]],
                     uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                     uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup ulong exchange[SAMPLE];
  threadgroup uint scratch[32];
  const Place place = {lane, simdgroup, simdgroups};
  const uint row = group / (p.slices + 1), slice = group % (p.slices + 1);
  device const T* values = logits + long(row) * p.row_stride;
  float x[PER_THREAD];
  if (slice < p.slices) {
    load_slice(values, slice, p.vocabulary, thread_id, x);
    uint largest = 0u;
#pragma unroll
    for (uint j = 0; j < PER_THREAD; j++) largest = max(largest, order_key(as_type<uint>(x[j])));
    largest = threadgroup_max(largest, scratch, place);
    if (thread_id == 0) maxima[long(row) * p.slices + slice] = largest;
    return;
  }
  ulong tokens[SAMPLED];
#pragma unroll
  for (uint j = 0; j < SAMPLED; j++) x[j] = float(values[sampled_index(j * BUCKETS + thread_id, p.vocabulary)]);
#pragma unroll
  for (uint j = 0; j < SAMPLED; j++) {
    tokens[j] = make_token(order_key(as_type<uint>(x[j])), sampled_index(j * BUCKETS + thread_id, p.vocabulary));
    tallies[(long(row) * TALLIES + j) * BUCKETS + thread_id] = 0u;
  }
  sort_tokens<SAMPLED>(tokens, exchange, BUCKETS, thread_id, lane);
  // The last bucket takes all that is left.
  splitters[long(row) * BUCKETS + thread_id] = thread_id == BUCKETS - 1 ? 0 : tokens[SAMPLED - 1];
}

// A threadgroup a slice: its tokens that can be drawn, bucket after bucket; what the buckets hold goes to the row's tallies.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(256)]]
void sampling_divide(device const T* logits [[buffer(0)]], device const uint* maxima [[buffer(1)]],
                     device const ulong* splitters [[buffer(2)]], device const float* row_parameters [[buffer(3)]],
                     device ulong* tokens [[buffer(4)]], device uint* segments [[buffer(5)]],
                     device atomic_uint* tallies [[buffer(6)]], device ulong* heavy [[buffer(7)]],
                     constant SamplingParams& p [[buffer(8)]], uint group [[threadgroup_position_in_grid]],
                     uint thread_id [[thread_position_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                     uint simdgroup [[simdgroup_index_in_threadgroup]],
                     uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup ulong divided[SLICE];
  threadgroup ulong ends[BUCKETS];  // ends[0] is not used
  threadgroup ulong sums[32];
  threadgroup uint starts[BUCKETS];
  threadgroup atomic_uint counts[BUCKETS];
  threadgroup atomic_uint low[BUCKETS];
  threadgroup atomic_uint high[BUCKETS];
  const Place place = {lane, simdgroup, simdgroups};
  const Bins bins = {counts, low, high};
  const uint row = group / p.slices, slice = group % p.slices;
  float x[PER_THREAD];
  load_slice(logits + long(row) * p.row_stride, slice, p.vocabulary, thread_id, x);
  const float maximum = row_maximum(maxima + long(row) * p.slices, p.slices, lane);
  const TokenFilter filter = row_filter(p, row_parameters, row, maximum);
  const Weigher weigher = {maximum, filter.scale};
  // The splitters as a search tree, of which node i has the children 2 i and 2 i + 1: unlike a sorted array, whose places
  // a power of two apart share a memory bank, what one step of the search reads lies side by side.
  if (thread_id != 0u) {
    const uint level = 31 - clz(thread_id), along = thread_id - (1u << level);
    ends[thread_id] = splitters[long(row) * BUCKETS + (((2 * along + 1) * (BUCKETS / 2)) >> level) - 1];
  }
  bins.clear(thread_id);

  ulong mine[PER_THREAD], heavy_mass = 0;
  uint buckets[PER_THREAD], slots[PER_THREAD];
#pragma unroll
  for (uint j = 0; j < PER_THREAD; j++) {
    mine[j] = make_token(order_key(as_type<uint>(x[j])), slice * SLICE + j * SLICE_THREADS + thread_id);
    buckets[j] = 1u;
#pragma unroll
    for (uint nodes = 1; nodes < BUCKETS; nodes *= 2) buckets[j] = 2 * buckets[j] + (ends[buckets[j]] > mine[j] ? 1u : 0u);
    buckets[j] -= BUCKETS;
  }
#pragma unroll
  for (uint j = 0; j < PER_THREAD; j++) {
    if (mine[j] == 0) continue;
    const ulong weight = weigher.weight(mine[j]);
    heavy_mass += weight >= filter.min_weight ? weight : 0;
    slots[j] = bins.add(buckets[j], weight);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const uint count = bins.count(thread_id);
  const Running running = threadgroup_scan(count, sums, place);
  const uint start = uint(running.sum) - count;
  starts[thread_id] = start;
  segments[long(group) * BUCKETS + thread_id] = start * (2 * SLICE) + count;
  add_to_row(tallies + long(row) * TALLIES * BUCKETS + thread_id, {count, bins.mass(thread_id)});
  heavy_mass = threadgroup_scan(heavy_mass, sums, place).total;
  if (thread_id == 0) heavy[group] = heavy_mass;
#pragma unroll
  for (uint j = 0; j < PER_THREAD; j++) {
    if (mine[j] != 0) divided[starts[buckets[j]] + slots[j]] = mine[j];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = thread_id; i < uint(running.total); i += SLICE_THREADS) tokens[long(group) * SLICE + i] = divided[i];
}

#define SEARCH_ROW(ranking)                                                                                   \
  threadgroup ulong found[MOST_SORTED];                                                                       \
  threadgroup ulong sums[32];                                                                                 \
  threadgroup Reached reached[1];                                                                             \
  threadgroup atomic_uint found_count[1];                                                                     \
  threadgroup uint bucket_counts[BUCKETS];                                                                    \
  threadgroup ulong bucket_masses[BUCKETS];                                                                   \
  threadgroup uint part_counts[BUCKETS];                                                                      \
  threadgroup ulong part_masses[BUCKETS];                                                                     \
  threadgroup atomic_uint counts[BUCKETS];                                                                    \
  threadgroup atomic_uint low[BUCKETS];                                                                       \
  threadgroup atomic_uint high[BUCKETS];                                                                      \
  const long first_slice = long(row) * p.slices;                                                              \
  const float maximum = row_maximum(maxima + first_slice, p.slices, lane);                                    \
  const TokenFilter filter = row_filter(p, row_parameters, row, maximum);                                     \
  const Ranking ranking = {                                                                                   \
      tokens + first_slice * SLICE,                                                                           \
      segments + first_slice * BUCKETS,                                                                       \
      tallies + long(row) * TALLIES * BUCKETS,                                                                \
      splitters + long(row) * BUCKETS,                                                                        \
      p.slices,                                                                                               \
      {maximum, filter.scale},                                                                                \
      {found, sums, reached, found_count, {bucket_counts, bucket_masses}, {part_counts, part_masses},         \
       {counts, low, high}},                                                                                  \
      thread_id,                                                                                              \
      {lane, simdgroup, simdgroups}};                                                                         \
  ranking.read_tallies();

// A threadgroup a row: the token drawn.
[[kernel, max_total_threads_per_threadgroup(1024)]]
void sampling_draw(device const ulong* tokens [[buffer(0)]], device const uint* segments [[buffer(1)]],
                   device const uint* tallies [[buffer(2)]], device const ulong* splitters [[buffer(3)]],
                   device const uint* maxima [[buffer(4)]], device const ulong* heavy [[buffer(5)]],
                   device const float* row_parameters [[buffer(6)]], device const ulong* state [[buffer(7)]],
                   device long* ids [[buffer(8)]], device uchar* valid [[buffer(9)]],
                   constant SamplingParams& p [[buffer(10)]], uint row [[threadgroup_position_in_grid]],
                   uint thread_id [[thread_position_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                   uint simdgroup [[simdgroup_index_in_threadgroup]],
                   uint simdgroups [[simdgroups_per_threadgroup]]) {
  SEARCH_ROW(ranking)
  const ulong seed = p.flags & STATE ? state[0] : p.seed;
  const ulong offset = p.flags & STATE ? state[1] : p.offset;
  const Kept kept = search_row(ranking, filter, heavy + first_slice, true, random_bits(seed, offset, row));
  if (thread_id == 0) {
    ids[row] = kept.drawn != 0 ? token_index(kept.drawn) : 0u;
    valid[row] = kept.drawn != 0 ? 1 : 0;
  }
}

// A threadgroup a slice: its logits that are kept, divided by the temperature, and -inf in place of the others.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(1024)]]
void filter_logits(device const T* logits [[buffer(0)]], device const ulong* tokens [[buffer(1)]],
                   device const uint* segments [[buffer(2)]], device const uint* tallies [[buffer(3)]],
                   device const ulong* splitters [[buffer(4)]], device const uint* maxima [[buffer(5)]],
                   device const ulong* heavy [[buffer(6)]], device const float* row_parameters [[buffer(7)]],
                   device T* output [[buffer(8)]], constant SamplingParams& p [[buffer(9)]],
                   uint group [[threadgroup_position_in_grid]], uint thread_id [[thread_position_in_threadgroup]],
                   uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                   uint simdgroups [[simdgroups_per_threadgroup]]) {
  const uint row = group / p.slices;
  SEARCH_ROW(ranking)
  const Kept kept = search_row(ranking, filter, heavy + first_slice, false, 0);
  for (uint i = thread_id; i < SLICE; i += THREADS) {
    const uint index = group % p.slices * SLICE + i;
    if (index >= p.vocabulary) break;
    const T logit = logits[long(row) * p.row_stride + index];
    const ulong token = make_token(order_key(as_type<uint>(float(logit))), index);
    const bool keep = token >= kept.last && ranking.weigher.weight(token) >= filter.min_weight;
    output[long(row) * p.vocabulary + index] = T(keep ? float(logit) / filter.divisor : -INFINITY);
  }
}

#define SAMPLING(name, T)                              \
  KERNEL("sampling_survey_" #name, sampling_survey<T>) \
  KERNEL("sampling_divide_" #name, sampling_divide<T>) \
  KERNEL("filter_logits_" #name, filter_logits<T>)
SAMPLING(f32, float)
SAMPLING(f16, half)
SAMPLING(bf16, bfloat)
