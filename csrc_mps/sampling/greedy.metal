// The lowest index of each row's maximum: a candidate a slice of the row, then the best of the candidates.
#include <metal_stdlib>
#include "common/kernel.metal.h"
#include "common/pack.metal.h"
#include "common/scan.metal.h"
#include "common/token_weight.h"
#include "sampling/sampling_params.h"
using namespace metal;
using namespace torch_fused;

// The larger key, then the lower index, of all threads; the index is valid in every thread.
inline uint2 best_token(uint key, uint index, threadgroup uint* scratch, Place place) {
  const uint largest = threadgroup_max(key, scratch, place);
  const uint lowest = ~threadgroup_max(key == largest ? ~index : 0u, scratch, place);
  return uint2(largest, lowest);
}

template <typename T, int W>
[[kernel, max_total_threads_per_threadgroup(256)]]
void greedy_slices(device const T* logits [[buffer(0)]], device uint2* best [[buffer(1)]],
                   constant GreedyParams& p [[buffer(2)]], uint group [[threadgroup_position_in_grid]],
                   uint thread_id [[thread_position_in_threadgroup]], uint threads [[threads_per_threadgroup]],
                   uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                   uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup uint scratch[32];
  const Place place = {lane, simdgroup, simdgroups};
  device const T* row = logits + long(group / p.slices) * p.row_stride;
  const uint start = group % p.slices * SLICE;
  uint key = 0u, index = 0u;
  for (uint column = start + thread_id * W; column < min(start + SLICE, p.vocabulary); column += threads * W) {
    float x[W];
    load_columns<W>(row, column, p.vocabulary, p.aligned, x);
#pragma unroll
    for (int j = 0; j < W; j++) {
      const uint other = column + j < p.vocabulary ? order_key(as_type<uint>(x[j])) : 0u;
      if (other > key) {
        key = other;
        index = column + j;
      }
    }
  }
  const uint2 token = best_token(key, index, scratch, place);
  if (thread_id == 0) best[group] = token;
}

kernel void greedy_rows(device const uint2* best [[buffer(0)]], device long* ids [[buffer(1)]],
                        constant GreedyParams& p [[buffer(2)]], uint row [[threadgroup_position_in_grid]],
                        uint thread_id [[thread_position_in_threadgroup]], uint threads [[threads_per_threadgroup]],
                        uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                        uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup uint scratch[32];
  const Place place = {lane, simdgroup, simdgroups};
  uint2 token = uint2(0u);
  for (uint i = thread_id; i < p.slices; i += threads) {
    const uint2 other = best[long(row) * p.slices + i];
    if (other.x > token.x) token = other;
  }
  token = best_token(token.x, token.y, scratch, place);
  if (thread_id == 0) ids[row] = token.x != 0u ? token.y : 0u;
}

#define GREEDY(name, T, W) KERNEL("greedy_slices_" #name, greedy_slices<T, W>)
GREEDY(f32, float, 4)
GREEDY(f16, half, 8)
GREEDY(bf16, bfloat, 8)
