// The sum of the squares of many tensors: of each section, then of all sections.
#include <metal_stdlib>
#include "common/kernel.metal.h"
#include "common/pack.metal.h"
#include "common/reduce.metal.h"
#include "sum_of_squares/sum_of_squares_params.h"
using namespace metal;
using namespace torch_fused;

#define SUMMED_TENSOR(i) device const T* x##i [[buffer(i)]]
#define PICK_TENSOR(i) \
  if (tensor == i) x = x##i;

template <typename T, int W>
[[kernel, max_total_threads_per_threadgroup(256)]]
void sum_of_squares(
    SUMMED_TENSOR(0), SUMMED_TENSOR(1), SUMMED_TENSOR(2), SUMMED_TENSOR(3), SUMMED_TENSOR(4), SUMMED_TENSOR(5),
    SUMMED_TENSOR(6), SUMMED_TENSOR(7), SUMMED_TENSOR(8), SUMMED_TENSOR(9), SUMMED_TENSOR(10), SUMMED_TENSOR(11),
    SUMMED_TENSOR(12), SUMMED_TENSOR(13), SUMMED_TENSOR(14), SUMMED_TENSOR(15), SUMMED_TENSOR(16), SUMMED_TENSOR(17),
    SUMMED_TENSOR(18), SUMMED_TENSOR(19), SUMMED_TENSOR(20), SUMMED_TENSOR(21), SUMMED_TENSOR(22), SUMMED_TENSOR(23),
    SUMMED_TENSOR(24), SUMMED_TENSOR(25), SUMMED_TENSOR(26), SUMMED_TENSOR(27), device float* partial [[buffer(28)]],
    constant SumOfSquaresParams& p [[buffer(29)]], uint group [[threadgroup_position_in_grid]],
    uint thread_id [[thread_position_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float scratch[32];
  uint tensor = 0;
#pragma unroll
  for (uint i = 1; i < SUMMED; i++) tensor += group >= p.first[i] ? 1 : 0;
  device const T* x = x0;
  PICK_TENSOR(1) PICK_TENSOR(2) PICK_TENSOR(3) PICK_TENSOR(4) PICK_TENSOR(5) PICK_TENSOR(6) PICK_TENSOR(7)
  PICK_TENSOR(8) PICK_TENSOR(9) PICK_TENSOR(10) PICK_TENSOR(11) PICK_TENSOR(12) PICK_TENSOR(13) PICK_TENSOR(14)
  PICK_TENSOR(15) PICK_TENSOR(16) PICK_TENSOR(17) PICK_TENSOR(18) PICK_TENSOR(19) PICK_TENSOR(20) PICK_TENSOR(21)
  PICK_TENSOR(22) PICK_TENSOR(23) PICK_TENSOR(24) PICK_TENSOR(25) PICK_TENSOR(26) PICK_TENSOR(27)
  const uint chunk = SUM_THREADS * SUM_PACKS * W;
  const long begin = long(group - p.first[tensor]) * chunk;
  const uint count = uint(min(p.numel[tensor] - begin, long(chunk)));
  const bool aligned = (p.aligned >> tensor & 1) != 0;
  float sum = 0.0f;
#pragma unroll
  for (uint i = 0; i < SUM_PACKS; i++) {
    const uint at = (i * SUM_THREADS + thread_id) * W;
    float values[W];
    load_columns<W>(x + begin, at, count, aligned, values);
#pragma unroll
    for (int j = 0; j < W; j++) sum = fma(values[j], values[j], sum);
  }
  const Place place = {lane, simdgroup, simdgroups};
  sum = threadgroup_sum(sum, scratch, place);
  if (thread_id == 0) partial[p.first_partial + group] = sum;
}

#define SUM_OF_SQUARES(name, T, W) KERNEL("sum_of_squares_" #name, sum_of_squares<T, W>)
SUM_OF_SQUARES(f32, float, 4)
SUM_OF_SQUARES(f16, half, 8)
SUM_OF_SQUARES(bf16, bfloat, 8)

[[kernel, max_total_threads_per_threadgroup(1024)]]
void sum_of_squares_total(device const float* partial [[buffer(0)]], device float* total [[buffer(1)]],
                          constant TotalParams& p [[buffer(2)]], uint thread_id [[thread_position_in_threadgroup]],
                          uint lane [[thread_index_in_simdgroup]],
                          uint simdgroup [[simdgroup_index_in_threadgroup]],
                          uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float scratch[32];
  float sum = 0.0f;
  for (uint i = thread_id; i < p.count; i += TOTAL_THREADS) sum += partial[i];
  const Place place = {lane, simdgroup, simdgroups};
  sum = threadgroup_sum(sum, scratch, place);
  if (thread_id == 0) *total = sum;
}
