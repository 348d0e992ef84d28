// Gradients of the RMS norm of rows (rms_norm.metal).
#include <metal_stdlib>
#include "common/pack.metal.h"
#include "common/reduce.metal.h"
#include "rms_norm/rms_norm.metal.h"
using namespace metal;

struct RmsNormBackwardParams {
  long grad_stride;  // elements from row to row; all other operands are dense
  long x_stride;
  uint rows;
  uint cols;
  uint flags;
  float eps;
  float weight_offset;
  uint unused;
};

// One row of the backward pass. With g = dy * weight and s = rsqrt(mean(x^2) + eps):
// dx = s * (g - x * s^2 * mean(g * x)) (+ the gradient of the sum), and dy * x * s is the row's part of dweight.
template <typename T, int W>
struct RmsNormGradRow {
  device const T* grad;
  device const T* grad_sum;
  device const T* x;
  device const T* weight;
  device T* grad_x;
  uint cols;
  uint flags;
  float weight_offset;

  void load(uint column, thread float* dy, thread float* values) const {
    load_columns<W>(grad, column, cols, flags & ALIGNED, dy);
    load_columns<W>(x, column, cols, flags & ALIGNED, values);
  }

  void load_weight(uint column, thread float* w) const {
    if (flags & HAS_WEIGHT) load_columns<W>(weight, column, cols, flags & ALIGNED, w);
#pragma unroll
    for (int j = 0; j < W; j++) w[j] = flags & HAS_WEIGHT ? w[j] + weight_offset : 1.0f;
  }

  // (sum of x^2, sum of g * x) of one pack.
  float2 sums(uint column, thread const float* dy, thread const float* values) const {
    float w[W];
    load_weight(column, w);
    float2 sum = float2(0.0f, 0.0f);
#pragma unroll
    for (int j = 0; j < W; j++) {
      sum.x += values[j] * values[j];
      sum.y += dy[j] * w[j] * values[j];
    }
    return sum;
  }

  // Stores dx of one pack and adds its part of dweight.
  void store(uint column, thread const float* dy, thread const float* values, float scale, float mean_gx,
             thread float* grad_weight) const {
    float w[W], dx[W];
    load_weight(column, w);
    if (flags & HAS_RESIDUAL) load_columns<W>(grad_sum, column, cols, flags & ALIGNED, dx);
#pragma unroll
    for (int j = 0; j < W; j++) {
      const float normed = values[j] * scale;
      const float d = scale * (dy[j] * w[j] - normed * mean_gx);
      dx[j] = flags & HAS_RESIDUAL ? dx[j] + d : d;
      grad_weight[j] += dy[j] * (flags & LLAMA ? float(T(normed)) : normed);
    }
    store_columns<W>(grad_x, column, cols, flags & ALIGNED, dx);
  }
};

inline float2 threadgroup_sums(float2 value, threadgroup float* scratch, Place place) {
  const float x = threadgroup_sum(value.x, scratch, place);
  return float2(x, threadgroup_sum(value.y, scratch, place));
}

// Each threadgroup takes every threadgroups-th row and leaves its part of dweight in `partial` (threadgroups x cols).
// N packs a thread in registers; N == 0: longer rows, read twice, with dweight accumulated in `partial` itself.
template <typename T, int W, int N>
[[kernel, max_total_threads_per_threadgroup(512)]]
void rms_norm_backward(device const T* grad [[buffer(0)]], device const T* grad_sum [[buffer(1)]],
                       device const T* x [[buffer(2)]], device const T* weight [[buffer(3)]],
                       device T* grad_x [[buffer(4)]], device float* partial [[buffer(5)]],
                       constant RmsNormBackwardParams& p [[buffer(6)]],
                       uint group [[threadgroup_position_in_grid]],
                       uint groups [[threadgroups_per_grid]],
                       uint thread_id [[thread_position_in_threadgroup]],
                       uint threads [[threads_per_threadgroup]],
                       uint lane [[thread_index_in_simdgroup]],
                       uint simdgroup [[simdgroup_index_in_threadgroup]],
                       uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float scratch[32];
  const Place place = {lane, simdgroup, simdgroups};
  const uint first = thread_id * W;
  const uint step = threads * W;
  const bool grad_weight = p.flags & GRAD_WEIGHT;
  device float* part = partial + (grad_weight ? long(group) * p.cols : 0);
  float dw[N > 0 ? N : 1][W] = {};
  for (uint row = group; row < p.rows; row += groups) {
    const RmsNormGradRow<T, W> r = {grad + long(row) * p.grad_stride,
                                    grad_sum + (p.flags & HAS_RESIDUAL ? long(row) * p.cols : 0),
                                    x + long(row) * p.x_stride,
                                    weight,
                                    grad_x + long(row) * p.cols,
                                    p.cols,
                                    p.flags,
                                    p.weight_offset};
    float dy[N > 0 ? N : 1][W], values[N > 0 ? N : 1][W];
    float2 sums = float2(0.0f, 0.0f);
    if (N > 0) {
#pragma unroll
      for (int i = 0; i < N; i++) r.load(first + i * step, dy[i], values[i]);
#pragma unroll
      for (int i = 0; i < N; i++) sums += r.sums(first + i * step, dy[i], values[i]);
    } else {
      for (uint column = first; column < p.cols; column += step) {
        r.load(column, dy[0], values[0]);
        sums += r.sums(column, dy[0], values[0]);
      }
    }
    sums = threadgroup_sums(sums, scratch, place) / float(p.cols);
    const float scale = rsqrt(sums.x + p.eps);
    const float mean_gx = sums.y * scale;
    if (N > 0) {
#pragma unroll
      for (int i = 0; i < N; i++) r.store(first + i * step, dy[i], values[i], scale, mean_gx, dw[i]);
    } else {
      for (uint column = first; column < p.cols; column += step) {
        r.load(column, dy[0], values[0]);
#pragma unroll
        for (int j = 0; j < W; j++) dw[0][j] = 0.0f;
        if (grad_weight && row != group) load_columns<W>(part, column, p.cols, false, dw[0]);
        r.store(column, dy[0], values[0], scale, mean_gx, dw[0]);
        if (grad_weight) store_columns<W>(part, column, p.cols, false, dw[0]);
      }
    }
  }
  if (N > 0 && grad_weight) {
#pragma unroll
    for (int i = 0; i < N; i++) store_columns<W>(part, first + i * step, p.cols, false, dw[i]);
  }
}

// dweight: the column sums of `partial`. A threadgroup takes 32 columns; its simdgroups share the rows.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(1024)]]
void rms_norm_grad_weight(device const float* partial [[buffer(0)]], device T* grad_weight [[buffer(1)]],
                          constant RmsNormBackwardParams& p [[buffer(2)]],
                          uint group [[threadgroup_position_in_grid]],
                          uint lane [[thread_index_in_simdgroup]],
                          uint simdgroup [[simdgroup_index_in_threadgroup]],
                          uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float sums[32][32];
  const uint column = group * 32 + lane;
  float sum = 0.0f;
  if (column < p.cols) {
    for (uint row = simdgroup; row < p.rows; row += simdgroups) sum += partial[long(row) * p.cols + column];
  }
  sums[simdgroup][lane] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup == 0 && column < p.cols) {
    for (uint i = 1; i < simdgroups; i++) sum += sums[i][lane];
    grad_weight[column] = T(sum);
  }
}

#define RMS_NORM_BACKWARD(name, T, W, N)                                                                            \
  template [[host_name("rms_norm_backward_" #name "_" #N)]] [[kernel]] void rms_norm_backward<T, W, N>(              \
      device const T*, device const T*, device const T*, device const T*, device T*, device float*,                  \
      constant RmsNormBackwardParams&, uint, uint, uint, uint, uint, uint, uint);
#define RMS_NORM_BACKWARD_ALL(name, T, W)                                                         \
  RMS_NORM_BACKWARD(name, T, W, 0)                                                                \
  RMS_NORM_BACKWARD(name, T, W, 1)                                                                \
  RMS_NORM_BACKWARD(name, T, W, 2)                                                                \
  RMS_NORM_BACKWARD(name, T, W, 4)                                                                \
  template [[host_name("rms_norm_grad_weight_" #name)]] [[kernel]] void rms_norm_grad_weight<T>(  \
      device const float*, device T*, constant RmsNormBackwardParams&, uint, uint, uint, uint);
RMS_NORM_BACKWARD_ALL(f32, float, 4)
RMS_NORM_BACKWARD_ALL(f16, half, 8)
RMS_NORM_BACKWARD_ALL(bf16, bfloat, 8)
