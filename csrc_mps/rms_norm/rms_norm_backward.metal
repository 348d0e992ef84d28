// Gradients of the RMS norm of rows (rms_norm.metal).
#include <metal_stdlib>
#include "common/kernel.metal.h"
#include "common/pack.metal.h"
#include "common/reduce.metal.h"
#include "rms_norm/rms_norm_params.h"
using namespace metal;
using namespace torch_fused;

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

  void load(uint column, thread Pack<T, W>* packs) const {
    packs[0].load(grad, column, cols, flags & ALIGNED);
    packs[1].load(x, column, cols, flags & ALIGNED);
  }

  void unpack(thread const Pack<T, W>* packs, thread float* dy, thread float* values) const {
    packs[0].unpack(dy);
    packs[1].unpack(values);
  }

  void load_weight(uint column, thread float* w) const {
    if (flags & HAS_WEIGHT) load_columns<W>(weight, column, cols, flags & ALIGNED, w);
#pragma unroll
    for (int j = 0; j < W; j++) w[j] = flags & HAS_WEIGHT ? w[j] + weight_offset : 1.0f;
  }

  // Adds x^2 and g * x of one pack to `sums`.
  void add(uint column, thread const float* dy, thread const float* values, thread float* sums) const {
    float w[W];
    load_weight(column, w);
#pragma unroll
    for (int j = 0; j < W; j++) {
      sums[0] += values[j] * values[j];
      sums[1] += dy[j] * w[j] * values[j];
    }
  }

  // The sum of g * normed, of a row whose sum of g * x overflows. All threads have read `scratch`.
  float sum_of_normed(float scale, threadgroup float* scratch, Place place) const {
    float sum = 0.0f;
    for (uint column = place.simdgroup * 32 + place.lane; column < cols; column += place.simdgroups * 32) {
      const float w = flags & HAS_WEIGHT ? float(weight[column]) + weight_offset : 1.0f;
      sum += float(grad[column]) * w * (float(x[column]) * scale);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return threadgroup_sum(sum, scratch, place);
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

// Each threadgroup takes every threadgroups-th row and leaves its part of dweight in `partial` (threadgroups x cols).
// N packs a thread: a row in one turn, kept in registers; N == 0: longer rows, read twice, in turns of a pack, with
// dweight accumulated in `partial` itself.
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
  constexpr int packs = N > 0 ? N : 1;
  threadgroup float scratch[2][2 * 32];  // of rows in turn: no row waits for the reads of the one before
  const Place place = {lane, simdgroup, simdgroups};
  const uint first = thread_id * W;
  const uint step = threads * W;
  const bool grad_weight = p.flags & GRAD_WEIGHT;
  device float* part = partial + (grad_weight ? long(group) * p.cols : 0);
  float dw[packs][W] = {};
  uint turn = 0;
  for (uint row = group; row < p.rows; row += groups) {
    const RmsNormGradRow<T, W> r = {grad + long(row) * p.grad_stride,
                                    grad_sum + (p.flags & HAS_RESIDUAL ? long(row) * p.cols : 0),
                                    x + long(row) * p.x_stride,
                                    weight,
                                    grad_x + long(row) * p.cols,
                                    p.cols,
                                    p.flags,
                                    p.weight_offset};
    Pack<T, W> loaded[packs][2];
    float dy[packs][W], values[packs][W];
    float sums[2] = {0.0f, 0.0f};
    for (uint column = first; N > 0 || column < p.cols; column += step) {
#pragma unroll
      for (int i = 0; i < packs; i++) r.load(column + i * step, loaded[i]);
#pragma unroll
      for (int i = 0; i < packs; i++) {
        r.unpack(loaded[i], dy[i], values[i]);
        r.add(column + i * step, dy[i], values[i], sums);
      }
      if (N > 0) break;
    }
    threadgroup_sums<2>(sums, scratch[turn], place);
    const float scale = rsqrt(sums[0] / float(p.cols) + p.eps);
    float mean_gx = sums[1] / float(p.cols) * scale;
    if (!isfinite(sums[1])) mean_gx = r.sum_of_normed(scale, scratch[turn], place) / float(p.cols);
    turn ^= 1;
    for (uint column = first; N > 0 || column < p.cols; column += step) {
      if (N == 0) {
        r.load(column, loaded[0]);
        r.unpack(loaded[0], dy[0], values[0]);
#pragma unroll
        for (int j = 0; j < W; j++) dw[0][j] = 0.0f;
        if (grad_weight && row != group) load_columns<W>(part, column, p.cols, false, dw[0]);
      }
#pragma unroll
      for (int i = 0; i < packs; i++) r.store(column + i * step, dy[i], values[i], scale, mean_gx, dw[i]);
      if (N == 0 && grad_weight) store_columns<W>(part, column, p.cols, false, dw[0]);
      if (N > 0) break;
    }
  }
  if (N > 0 && grad_weight) {
#pragma unroll
    for (int i = 0; i < N; i++) store_columns<W>(part, first + i * step, p.cols, false, dw[i]);
  }
}

#define RMS_NORM_BACKWARD(name, T, W)                                 \
  KERNEL("rms_norm_backward_" #name "_0", rms_norm_backward<T, W, 0>) \
  KERNEL("rms_norm_backward_" #name "_1", rms_norm_backward<T, W, 1>) \
  KERNEL("rms_norm_backward_" #name "_2", rms_norm_backward<T, W, 2>) \
  KERNEL("rms_norm_backward_" #name "_4", rms_norm_backward<T, W, 4>)
RMS_NORM_BACKWARD(f32, float, 4)
RMS_NORM_BACKWARD(f16, half, 8)
RMS_NORM_BACKWARD(bf16, bfloat, 8)
