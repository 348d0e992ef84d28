// RMS norm of rows: y = x * rsqrt(mean(x^2) + eps) * weight, with x = input (+ residual).
#include <metal_stdlib>
#include "common/kernel.metal.h"
#include "common/pack.metal.h"
#include "common/reduce.metal.h"
#include "rms_norm/rms_norm_params.h"
using namespace metal;
using namespace torch_fused;

// One row's operands, and how to read and write a pack of it.
template <typename T, int W>
struct RmsNormRow {
  device const T* input;
  device const T* residual;
  device const T* weight;
  device T* output;
  device T* sum;
  uint cols;
  uint flags;
  float weight_offset;

  void load(uint column, thread Pack<T, W>* packs) const {
    packs[0].load(input, column, cols, flags & ALIGNED);
    if (flags & HAS_RESIDUAL) packs[1].load(residual, column, cols, flags & ALIGNED);
  }

  // x = input (+ residual, rounded to T, because that sum is a result of its own).
  void unpack(uint column, thread const Pack<T, W>* packs, thread float* x) const {
    packs[0].unpack(x);
    if (!(flags & HAS_RESIDUAL)) return;
    float residual_x[W];
    packs[1].unpack(residual_x);
#pragma unroll
    for (int j = 0; j < W; j++) x[j] = float(T(x[j] + residual_x[j]));
    store_columns<W>(sum, column, cols, flags & ALIGNED, x);
  }

  void store_normed(uint column, thread const float* x, float scale) const {
    float w[W], y[W];
    if (flags & HAS_WEIGHT) load_columns<W>(weight, column, cols, flags & ALIGNED, w);
#pragma unroll
    for (int j = 0; j < W; j++) {
      y[j] = x[j] * scale;
      if (flags & LLAMA) {
        y[j] = float(T(y[j]));
        if (flags & HAS_WEIGHT) y[j] *= float(T(w[j] + weight_offset));
      } else if (flags & HAS_WEIGHT) {
        y[j] *= w[j] + weight_offset;
      }
    }
    store_columns<W>(output, column, cols, flags & ALIGNED, y);
  }
};

template <int W>
inline float sum_of_squares(thread const float* x) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < W; j++) sum += x[j] * x[j];
  return sum;
}

// One threadgroup a row. N packs of W values a thread: the row is read once, in one turn, and stays in registers.
// N == 0: a longer row, read twice, in turns of a pack.
template <typename T, int W, int N>
[[kernel, max_total_threads_per_threadgroup(512)]]
void rms_norm(device const T* input [[buffer(0)]], device const T* residual [[buffer(1)]],
              device const T* weight [[buffer(2)]], device T* output [[buffer(3)]],
              device T* sum [[buffer(4)]], constant RmsNormParams& p [[buffer(5)]],
              uint row [[threadgroup_position_in_grid]], uint thread_id [[thread_position_in_threadgroup]],
              uint threads [[threads_per_threadgroup]], uint lane [[thread_index_in_simdgroup]],
              uint simdgroup [[simdgroup_index_in_threadgroup]],
              uint simdgroups [[simdgroups_per_threadgroup]]) {
  constexpr int packs = N > 0 ? N : 1;
  threadgroup float scratch[32];
  const Place place = {lane, simdgroup, simdgroups};
  const RmsNormRow<T, W> r = {input + long(row) * p.input_stride,
                              residual + long(row) * p.residual_stride,
                              weight,
                              output + long(row) * p.cols,
                              sum + long(row) * p.cols,
                              p.cols,
                              p.flags,
                              p.weight_offset};
  const uint first = thread_id * W;
  const uint step = threads * W;
  float squares = 0.0f;
  Pack<T, W> loaded[packs][2];
  float x[packs][W];
  for (uint column = first; N > 0 || column < p.cols; column += step) {
#pragma unroll
    for (int i = 0; i < packs; i++) r.load(column + i * step, loaded[i]);
#pragma unroll
    for (int i = 0; i < packs; i++) {
      r.unpack(column + i * step, loaded[i], x[i]);
      squares += sum_of_squares<W>(x[i]);
    }
    if (N > 0) break;
  }
  const float scale = rsqrt(threadgroup_sum(squares, scratch, place) / float(p.cols) + p.eps);
  for (uint column = first; N > 0 || column < p.cols; column += step) {
    if (N == 0) load_columns<W>(p.flags & HAS_RESIDUAL ? r.sum : r.input, column, p.cols, p.flags & ALIGNED, x[0]);
#pragma unroll
    for (int i = 0; i < packs; i++) r.store_normed(column + i * step, x[i], scale);
    if (N > 0) break;
  }
}

#define RMS_NORM(name, T, W)                        \
  KERNEL("rms_norm_" #name "_0", rms_norm<T, W, 0>) \
  KERNEL("rms_norm_" #name "_1", rms_norm<T, W, 1>) \
  KERNEL("rms_norm_" #name "_2", rms_norm<T, W, 2>) \
  KERNEL("rms_norm_" #name "_4", rms_norm<T, W, 4>)
RMS_NORM(f32, float, 4)
RMS_NORM(f16, half, 8)
RMS_NORM(bf16, bfloat, 8)
