// The column sums of a matrix of partial sums: the second step of a parameter's gradient.
#include <metal_stdlib>
#include "common/column_sum_params.h"
#include "common/kernel.metal.h"
using namespace metal;
using namespace torch_fused;

// The threads of a threadgroup share the rows.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(1024)]]
void column_sum(device const float* partial [[buffer(0)]], device T* sums [[buffer(1)]],
                constant ColumnSumParams& p [[buffer(2)]], uint group [[threadgroup_position_in_grid]],
                uint thread_id [[thread_position_in_threadgroup]], uint threads [[threads_per_threadgroup]],
                uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float scratch[32][COLUMNS];
  const uint first = group * COLUMNS, column = first + thread_id % COLUMNS;
  float sum = 0.0f;
  if (column < p.cols) {
    for (uint row = thread_id / COLUMNS; row < p.rows; row += threads / COLUMNS) {
      sum += partial[long(row) * p.cols + column];
    }
  }
  for (ushort distance = COLUMNS; distance < 32; distance *= 2) sum += simd_shuffle_xor(sum, distance);
  if (lane < COLUMNS) scratch[simdgroup][lane] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup < COLUMNS && first + simdgroup < p.cols) {
    sum = simd_sum(lane < simdgroups ? scratch[lane][simdgroup] : 0.0f);
    if (lane == 0) sums[first + simdgroup] = T(sum);
  }
}

#define COLUMN_SUM(name, T) KERNEL("column_sum_" #name, column_sum<T>)
COLUMN_SUM(f32, float)
COLUMN_SUM(f16, half)
COLUMN_SUM(bf16, bfloat)
