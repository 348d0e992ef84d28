// The column sums of a matrix of partial sums: the second step of a parameter's gradient.
#include <metal_stdlib>
using namespace metal;

struct ColumnSumParams {
  uint rows;
  uint cols;
};

// A threadgroup takes 32 columns; its simdgroups share the rows.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(1024)]]
void column_sum(device const float* partial [[buffer(0)]], device T* sums [[buffer(1)]],
                constant ColumnSumParams& p [[buffer(2)]], uint group [[threadgroup_position_in_grid]],
                uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float scratch[32][32];
  const uint column = group * 32 + lane;
  float sum = 0.0f;
  if (column < p.cols) {
    for (uint row = simdgroup; row < p.rows; row += simdgroups) sum += partial[long(row) * p.cols + column];
  }
  scratch[simdgroup][lane] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup == 0 && column < p.cols) {
    for (uint i = 1; i < simdgroups; i++) sum += scratch[i][lane];
    sums[column] = T(sum);
  }
}

#define COLUMN_SUM(name, T)                                                              \
  template [[host_name("column_sum_" #name)]] [[kernel]] void column_sum<T>(             \
      device const float*, device T*, constant ColumnSumParams&, uint, uint, uint, uint);
COLUMN_SUM(f32, float)
COLUMN_SUM(f16, half)
COLUMN_SUM(bf16, bfloat)
