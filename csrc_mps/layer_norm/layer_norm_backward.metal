// Gradients of the layer norm of rows (layer_norm.metal). Mean and variance are found again from x, which is read anyway.
#include <metal_stdlib>
#include "common/kernel.metal.h"
#include "common/pack.metal.h"
#include "common/reduce.metal.h"
#include "layer_norm/layer_norm.metal.h"
using namespace metal;

// What a row's sums say of its gradient.
struct Slopes {
  float mean_g;
  float mean_gn;
};

// What each simdgroup leaves for the others.
struct SimdgroupSums {
  float4 seen[32];
  float2 slopes[32];  // the sums of g and of g * (x - shift)
};

inline Slopes slopes_of(threadgroup const SimdgroupSums& all, Moments m, uint cols, Place place) {
  float2 sums = float2(0.0f);
  if (place.lane < place.simdgroups) {
    sums = all.slopes[place.lane];
    sums.y = (sums.y - (m.mean - all.seen[place.lane].x + m.rest) * sums.x) * m.rstd;
  }
  return {simd_sum(sums.x) / float(cols), simd_sum(sums.y) / float(cols)};
}

// One row of the backward pass. With g = dy * weight and n = (x - mean) * rstd: dx = rstd * (g - mean(g) - n * mean(g * n)),
// and dy * n and dy are the row's parts of dweight and dbias.
template <typename T, int W>
struct LayerNormGradRow {
  device const T* grad;
  device const T* x;
  device const T* weight;
  device T* grad_x;
  uint cols;
  uint flags;

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
    for (int j = 0; j < W; j++) w[j] = flags & HAS_WEIGHT ? w[j] : 1.0f;
  }

  // Adds x to `seen`, g and g * (x - shift) to `sums`.
  void add(uint column, thread const float* dy, thread const float* values, thread Seen& seen,
           thread float* sums) const {
    float w[W];
    load_weight(column, w);
    seen.add<W>(column, cols, values);
#pragma unroll
    for (int j = 0; j < W; j++) {
      const float g = dy[j] * w[j];
      sums[0] += g;
      sums[1] += g * (values[j] - seen.shift);
    }
  }

  // The slopes of a row whose sums have overflowed, from its moments.
  Slopes slopes_about(Moments m, threadgroup float2* scratch, Place place) const {
    float g_sum = 0.0f, gn_sum = 0.0f;
    for (uint column = place.simdgroup * 32 + place.lane; column < cols; column += place.simdgroups * 32) {
      const float g = float(grad[column]) * (flags & HAS_WEIGHT ? float(weight[column]) : 1.0f);
      g_sum += g;
      gn_sum += g * m.normed(float(x[column]));
    }
    const float2 sums = float2(simd_sum(g_sum), simd_sum(gn_sum));
    if (place.lane == 0) scratch[place.simdgroup] = sums;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const float2 part = place.lane < place.simdgroups ? scratch[place.lane] : float2(0.0f);
    return {simd_sum(part.x) / float(cols), simd_sum(part.y) / float(cols)};
  }

  // Stores dx of one pack and adds its parts of dweight and dbias.
  void store(uint column, thread const float* dy, thread const float* values, Moments m, Slopes slopes,
             thread float* grad_weight, thread float* grad_bias) const {
    float w[W], dx[W];
    load_weight(column, w);
#pragma unroll
    for (int j = 0; j < W; j++) {
      const float normed = m.normed(values[j]);
      dx[j] = m.rstd * m.unit * (dy[j] * w[j] - slopes.mean_g - normed * slopes.mean_gn);
      grad_weight[j] += dy[j] * normed;
      grad_bias[j] += dy[j];
    }
    store_columns<W>(grad_x, column, cols, flags & ALIGNED, dx);
  }
};

// Each threadgroup takes every threadgroups-th row and leaves its part of dweight, then of dbias, in its row of
// `partial`, without those that are not needed. N packs a thread: a row in one turn, kept in registers; N == 0: longer
// rows, read twice, in turns of a pack, with the parts accumulated in `partial` itself.
template <typename T, int W, int N>
[[kernel, max_total_threads_per_threadgroup(512)]]
void layer_norm_backward(device const T* grad [[buffer(0)]], device const T* x [[buffer(1)]],
                         device const T* weight [[buffer(2)]], device T* grad_x [[buffer(3)]],
                         device float* partial [[buffer(4)]], constant LayerNormBackwardParams& p [[buffer(5)]],
                         uint group [[threadgroup_position_in_grid]], uint groups [[threadgroups_per_grid]],
                         uint thread_id [[thread_position_in_threadgroup]],
                         uint threads [[threads_per_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                         uint simdgroup [[simdgroup_index_in_threadgroup]],
                         uint simdgroups [[simdgroups_per_threadgroup]]) {
  constexpr int packs = N > 0 ? N : 1;
  threadgroup SimdgroupSums shared[2];  // of rows in turn: no row waits for the reads of the one before
  const Place place = {lane, simdgroup, simdgroups};
  const uint first = thread_id * W;
  const uint step = threads * W;
  const bool grad_weight = p.flags & GRAD_WEIGHT, grad_bias = p.flags & GRAD_BIAS;
  device float* weight_part = partial + long(group) * p.cols * (uint(grad_weight) + uint(grad_bias));
  device float* bias_part = weight_part + (grad_weight ? p.cols : 0);
  float dw[packs][W] = {}, db[packs][W] = {};
  uint turn = 0;
  for (uint row = group; row < p.rows; row += groups) {
    const LayerNormGradRow<T, W> r = {grad + long(row) * p.grad_stride,
                                      x + long(row) * p.x_stride,
                                      weight,
                                      grad_x + long(row) * p.cols,
                                      p.cols,
                                      p.flags};
    Pack<T, W> loaded[packs][2];
    float dy[packs][W], values[packs][W];
#pragma unroll
    for (int i = 0; i < packs; i++) r.load(first + i * step, loaded[i]);
#pragma unroll
    for (int i = 0; i < packs; i++) r.unpack(loaded[i], dy[i], values[i]);
    float sum = 0.0f;
    uint count = 0u;
#pragma unroll
    for (int i = 0; i < packs; i++) {
      sum += pack_sum<W>(values[i]);
      count += in_row<W>(first + i * step, p.cols);
    }
    if (N == 0) {  // more than the thread's first pack, as a shift for many
      sum = simd_sum(sum);
      count = simd_sum(count);
    }
    Seen seen = {sum / float(max(count, 1u)), 0u, 0.0f, 0.0f};
    float sums[2] = {0.0f, 0.0f};
    for (uint column = first; N > 0 || column < p.cols; column += step) {
      if (N == 0) {
        r.load(column, loaded[0]);
        r.unpack(loaded[0], dy[0], values[0]);
      }
#pragma unroll
      for (int i = 0; i < packs; i++) r.add(column + i * step, dy[i], values[i], seen, sums);
      if (N > 0) break;
    }
    const float shift = seen.shift;
    seen = seen.of_simdgroup();
    sums[1] = fma(shift - seen.shift, sums[0], sums[1]);
    const float2 slope_sums = float2(simd_sum(sums[0]), simd_sum(sums[1]));
    threadgroup SimdgroupSums& all = shared[turn];
    turn ^= 1;
    if (lane == 0) {
      all.seen[simdgroup] = seen.packed();
      all.slopes[simdgroup] = slope_sums;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    Moments m = moments_of(all.seen, p.cols, p.eps, place);
    Slopes slopes = slopes_of(all, m, p.cols, place);
    if (m.overflowed()) {
      m = small_row_moments(r.x, p.cols, p.eps, all.seen, place);
      slopes = r.slopes_about(m, all.slopes, place);
    }
    for (uint column = first; N > 0 || column < p.cols; column += step) {
      if (N == 0) {
        r.load(column, loaded[0]);
        r.unpack(loaded[0], dy[0], values[0]);
#pragma unroll
        for (int j = 0; j < W; j++) dw[0][j] = db[0][j] = 0.0f;
        if (grad_weight && row != group) load_columns<W>(weight_part, column, p.cols, false, dw[0]);
        if (grad_bias && row != group) load_columns<W>(bias_part, column, p.cols, false, db[0]);
      }
#pragma unroll
      for (int i = 0; i < packs; i++) r.store(column + i * step, dy[i], values[i], m, slopes, dw[i], db[i]);
      if (N == 0 && grad_weight) store_columns<W>(weight_part, column, p.cols, false, dw[0]);
      if (N == 0 && grad_bias) store_columns<W>(bias_part, column, p.cols, false, db[0]);
      if (N > 0) break;
    }
  }
  if (N > 0) {
#pragma unroll
    for (int i = 0; i < packs; i++) {
      if (grad_weight) store_columns<W>(weight_part, first + i * step, p.cols, false, dw[i]);
      if (grad_bias) store_columns<W>(bias_part, first + i * step, p.cols, false, db[i]);
    }
  }
}

#define LAYER_NORM_BACKWARD(name, T, W)                                   \
  KERNEL("layer_norm_backward_" #name "_0", layer_norm_backward<T, W, 0>) \
  KERNEL("layer_norm_backward_" #name "_1", layer_norm_backward<T, W, 1>) \
  KERNEL("layer_norm_backward_" #name "_2", layer_norm_backward<T, W, 2>) \
  KERNEL("layer_norm_backward_" #name "_4", layer_norm_backward<T, W, 4>)
LAYER_NORM_BACKWARD(f32, float, 4)
LAYER_NORM_BACKWARD(f16, half, 8)
LAYER_NORM_BACKWARD(bf16, bfloat, 8)
