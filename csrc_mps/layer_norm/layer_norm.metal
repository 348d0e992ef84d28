// Layer norm of rows: y = (x - mean) * rsqrt(variance + eps) * weight + bias.
#include <metal_stdlib>
#include "common/kernel.metal.h"
#include "common/pack.metal.h"
#include "common/reduce.metal.h"
#include "layer_norm/layer_norm.metal.h"
using namespace metal;

// One row's operands, and how to read and write a pack of it.
template <typename T, int W>
struct LayerNormRow {
  device const T* input;
  device const T* weight;
  device const T* bias;
  device T* output;
  uint cols;
  uint flags;

  void load(uint column, thread Pack<T, W>& x) const { x.load(input, column, cols, flags & ALIGNED); }

  void store_normed(uint column, thread const float* x, Moments m) const {
    Pack<T, W> weight_pack, bias_pack;
    float w[W], b[W], y[W];
    if (flags & HAS_WEIGHT) weight_pack.load(weight, column, cols, flags & ALIGNED);
    if (flags & HAS_BIAS) bias_pack.load(bias, column, cols, flags & ALIGNED);
    if (flags & HAS_WEIGHT) {
      weight_pack.unpack(w);
    } else {
      fill<W>(w, 1.0f);
    }
    if (flags & HAS_BIAS) {
      bias_pack.unpack(b);
    } else {
      fill<W>(b, 0.0f);
    }
#pragma unroll
    for (int j = 0; j < W; j++) y[j] = fma(m.normed(x[j]), w[j], b[j]);
    store_columns<W>(output, column, cols, flags & ALIGNED, y);
  }
};

// One threadgroup a row. N packs of W values a thread: the row is read once, in one turn, and stays in registers.
// N == 0: a longer row, read twice, in turns of a pack. A bound above the threads that are launched holds registers
// back, for more rows at once.
template <typename T, int W, int N>
[[kernel, max_total_threads_per_threadgroup(1024)]]
void layer_norm(device const T* input [[buffer(0)]], device const T* weight [[buffer(1)]],
                device const T* bias [[buffer(2)]], device T* output [[buffer(3)]],
                constant LayerNormParams& p [[buffer(4)]], uint row [[threadgroup_position_in_grid]],
                uint thread_id [[thread_position_in_threadgroup]], uint threads [[threads_per_threadgroup]],
                uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                uint simdgroups [[simdgroups_per_threadgroup]]) {
  constexpr int packs = N > 0 ? N : 1;
  threadgroup float4 scratch[32];
  const Place place = {lane, simdgroup, simdgroups};
  const LayerNormRow<T, W> r = {
      input + long(row) * p.input_stride, weight, bias, output + long(row) * p.cols, p.cols, p.flags};
  const uint first = thread_id * W;
  const uint step = threads * W;
  Pack<T, W> loaded[packs];
  float x[packs][W];
#pragma unroll
  for (int i = 0; i < packs; i++) r.load(first + i * step, loaded[i]);
#pragma unroll
  for (int i = 0; i < packs; i++) loaded[i].unpack(x[i]);
  float sum = 0.0f;
  uint count = 0u;
#pragma unroll
  for (int i = 0; i < packs; i++) {
    sum += pack_sum<W>(x[i]);
    count += in_row<W>(first + i * step, p.cols);
  }
  Seen seen = {simd_sum(sum) / float(max(simd_sum(count), 1u)), 0u, 0.0f, 0.0f};
  for (uint column = first; N > 0 || column < p.cols; column += step) {
    if (N == 0) load_columns<W>(r.input, column, p.cols, p.flags & ALIGNED, x[0]);
#pragma unroll
    for (int i = 0; i < packs; i++) seen.add<W>(column + i * step, p.cols, x[i]);
    if (N > 0) break;
  }
  Moments m = row_moments(seen.of_simdgroup(), p.cols, p.eps, scratch, place);
  if (m.overflowed()) m = small_row_moments(r.input, p.cols, p.eps, scratch, place);
  for (uint column = first; N > 0 || column < p.cols; column += step) {
    if (N == 0) load_columns<W>(r.input, column, p.cols, p.flags & ALIGNED, x[0]);
#pragma unroll
    for (int i = 0; i < packs; i++) r.store_normed(column + i * step, x[i], m);
    if (N > 0) break;
  }
}

#define LAYER_NORM(name, T, W)                          \
  KERNEL("layer_norm_" #name "_0", layer_norm<T, W, 0>) \
  KERNEL("layer_norm_" #name "_2", layer_norm<T, W, 2>) \
  KERNEL("layer_norm_" #name "_4", layer_norm<T, W, 4>)
LAYER_NORM(f32, float, 4)
LAYER_NORM(f16, half, 8)
LAYER_NORM(bf16, bfloat, 8)
