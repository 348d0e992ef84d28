// Softmax of rows, y = exp(x - max) / sum(exp(x - max)), and its gradient, dx = y * (dy - sum(dy * y)).
#include <metal_stdlib>
#include "common/kernel.metal.h"
#include "common/online.metal.h"
#include "common/pack.metal.h"
#include "common/reduce.metal.h"
#include "softmax/softmax_params.h"
using namespace metal;
using namespace torch_fused;

// The sum over the columns before `end`, of which each thread takes every step-th pack from `column` on. Past the end
// stands -inf, which adds nothing.
template <int W, typename T>
inline Online sum_of_columns(device const T* row, uint column, uint end, uint step, bool aligned,
                           threadgroup float2* scratch, Place place) {
  Online mine = {-INFINITY, 0.0f};
  for (; column < end; column += step) {
    float x[W];
    load_columns<W>(row, column, end, aligned, x, -INFINITY);
    mine.add<W>(x);
  }
  return mine.of_simdgroup().of_threadgroup(scratch, place);
}

// The results of the same columns, with the whole row's sum.
template <int W, typename T>
inline void softmax_columns(device const T* row, device T* result, uint column, uint end, uint step, bool aligned,
                            Online total) {
  const float scale = 1.0f / total.sum;
  for (; column < end; column += step) {
    float x[W];
    load_columns<W>(row, column, end, aligned, x, -INFINITY);
#pragma unroll
    for (int j = 0; j < W; j++) x[j] = exp(x[j] - total.largest) * scale;
    store_columns<W>(result, column, end, aligned, x);
  }
}

// One threadgroup a row. N packs of W values a thread: the row is read once and stays in registers. N == 0: a longer
// row, read twice. A bound above the threads that are launched holds registers back, for more rows at once.
template <typename T, int W, int N>
[[kernel, max_total_threads_per_threadgroup(1024)]]
void softmax(device const T* input [[buffer(0)]], device T* output [[buffer(1)]],
             constant SoftmaxParams& p [[buffer(2)]], uint row [[threadgroup_position_in_grid]],
             uint thread_id [[thread_position_in_threadgroup]], uint threads [[threads_per_threadgroup]],
             uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
             uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float2 scratch[32];
  const Place place = {lane, simdgroup, simdgroups};
  device const T* in = input + long(row) * p.input_stride;
  device T* out = output + long(row) * p.cols;
  const uint first = thread_id * W;
  const uint step = threads * W;
  if (N > 0) {
    Pack<T, W> loaded[N > 0 ? N : 1];
    float x[N > 0 ? N : 1][W];
#pragma unroll
    for (int i = 0; i < N; i++) loaded[i].load(in, first + i * step, p.cols, p.aligned, -INFINITY);
#pragma unroll
    for (int i = 0; i < N; i++) loaded[i].unpack(x[i]);
    // Exponentials from the simdgroup's own maximum, so that the threadgroup meets only once.
    Online mine = {-INFINITY, 0.0f};
#pragma unroll
    for (int i = 0; i < N; i++) {
#pragma unroll
      for (int j = 0; j < W; j++) mine.largest = max(mine.largest, x[i][j]);
    }
    mine.largest = simd_max(mine.largest);
    const float by = Online::shift(mine.largest);
#pragma unroll
    for (int i = 0; i < N; i++) {
#pragma unroll
      for (int j = 0; j < W; j++) {
        x[i][j] = exp(x[i][j] - by);
        mine.sum += x[i][j];
      }
    }
    mine.sum = simd_sum(mine.sum);
    const Online total = mine.of_threadgroup(scratch, place);
    const float scale = exp(mine.largest - total.largest) / total.sum;
#pragma unroll
    for (int i = 0; i < N; i++) {
#pragma unroll
      for (int j = 0; j < W; j++) x[i][j] *= scale;
      store_columns<W>(out, first + i * step, p.cols, p.aligned, x[i]);
    }
  } else {
    const Online total = sum_of_columns<W>(in, first, p.cols, step, p.aligned, scratch, place);
    softmax_columns<W>(in, out, first, p.cols, step, p.aligned, total);
  }
}

// A row shared by p.chunks threadgroups: each leaves the maximum and the sum of its chunk in `partial`.
template <typename T, int W>
[[kernel, max_total_threads_per_threadgroup(512)]]
void softmax_chunk(device const T* input [[buffer(0)]], device float2* partial [[buffer(1)]],
                   constant SoftmaxParams& p [[buffer(2)]], uint group [[threadgroup_position_in_grid]],
                   uint thread_id [[thread_position_in_threadgroup]], uint threads [[threads_per_threadgroup]],
                   uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                   uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float2 scratch[32];
  const Place place = {lane, simdgroup, simdgroups};
  const uint begin = group % p.chunks * p.chunk;
  const uint end = min(begin + p.chunk, p.cols);
  device const T* in = input + long(group / p.chunks) * p.input_stride;
  const Online total = sum_of_columns<W>(in, begin + thread_id * W, end, threads * W, p.aligned, scratch, place);
  if (thread_id == 0) partial[group] = float2(total.largest, total.sum);
}

// Then each threadgroup combines its row's partial results and writes its chunk.
template <typename T, int W>
[[kernel, max_total_threads_per_threadgroup(512)]]
void softmax_finish(device const T* input [[buffer(0)]], device const float2* partial [[buffer(1)]],
                    device T* output [[buffer(2)]], constant SoftmaxParams& p [[buffer(3)]],
                    uint group [[threadgroup_position_in_grid]], uint thread_id [[thread_position_in_threadgroup]],
                    uint threads [[threads_per_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                    uint simdgroup [[simdgroup_index_in_threadgroup]],
                    uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float2 scratch[32];
  const Place place = {lane, simdgroup, simdgroups};
  const uint row = group / p.chunks;
  const uint begin = group % p.chunks * p.chunk;
  const uint end = min(begin + p.chunk, p.cols);
  Online mine = {-INFINITY, 0.0f};
  if (thread_id < p.chunks) {  // never more chunks than threads
    const float2 part = partial[row * p.chunks + thread_id];
    mine = {part.x, part.y};
  }
  const Online total = mine.of_simdgroup().of_threadgroup(scratch, place);
  device const T* in = input + long(row) * p.input_stride;
  device T* out = output + long(row) * p.cols;
  softmax_columns<W>(in, out, begin + thread_id * W, end, threads * W, p.aligned, total);
}

// N as for softmax: the row is read in one turn, or twice in turns of a pack.
template <typename T, int W, int N>
[[kernel, max_total_threads_per_threadgroup(512)]]
void softmax_backward(device const T* grad [[buffer(0)]], device const T* output [[buffer(1)]],
                      device T* grad_input [[buffer(2)]], constant SoftmaxParams& p [[buffer(3)]],
                      uint row [[threadgroup_position_in_grid]], uint thread_id [[thread_position_in_threadgroup]],
                      uint threads [[threads_per_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                      uint simdgroup [[simdgroup_index_in_threadgroup]],
                      uint simdgroups [[simdgroups_per_threadgroup]]) {
  constexpr int packs = N > 0 ? N : 1;
  threadgroup float scratch[32];
  const Place place = {lane, simdgroup, simdgroups};
  device const T* grads = grad + long(row) * p.input_stride;
  device const T* out = output + long(row) * p.output_stride;
  device T* to = grad_input + long(row) * p.cols;
  const uint first = thread_id * W;
  const uint step = threads * W;
  Pack<T, W> dy_packs[packs], y_packs[packs];
  float dy[packs][W], y[packs][W];
  float dot = 0.0f;
  for (uint column = first; N > 0 || column < p.cols; column += step) {
#pragma unroll
    for (int i = 0; i < packs; i++) {
      dy_packs[i].load(grads, column + i * step, p.cols, p.aligned);
      y_packs[i].load(out, column + i * step, p.cols, p.aligned);
    }
#pragma unroll
    for (int i = 0; i < packs; i++) {
      dy_packs[i].unpack(dy[i]);
      y_packs[i].unpack(y[i]);
#pragma unroll
      for (int j = 0; j < W; j++) dot += dy[i][j] * y[i][j];
    }
    if (N > 0) break;
  }
  dot = threadgroup_sum(dot, scratch, place);
  for (uint column = first; N > 0 || column < p.cols; column += step) {
    if (N == 0) {
      dy_packs[0].load(grads, column, p.cols, p.aligned);
      y_packs[0].load(out, column, p.cols, p.aligned);
      dy_packs[0].unpack(dy[0]);
      y_packs[0].unpack(y[0]);
    }
#pragma unroll
    for (int i = 0; i < packs; i++) {
#pragma unroll
      for (int j = 0; j < W; j++) y[i][j] *= dy[i][j] - dot;
      store_columns<W>(to, column + i * step, p.cols, p.aligned, y[i]);
    }
    if (N > 0) break;
  }
}

#define SOFTMAX(name, T, W)                                         \
  KERNEL("softmax_" #name "_0", softmax<T, W, 0>)                   \
  KERNEL("softmax_" #name "_4", softmax<T, W, 4>)                   \
  KERNEL("softmax_backward_" #name "_0", softmax_backward<T, W, 0>) \
  KERNEL("softmax_backward_" #name "_1", softmax_backward<T, W, 1>) \
  KERNEL("softmax_backward_" #name "_2", softmax_backward<T, W, 2>) \
  KERNEL("softmax_backward_" #name "_4", softmax_backward<T, W, 4>) \
  KERNEL("softmax_chunk_" #name, softmax_chunk<T, W>)               \
  KERNEL("softmax_finish_" #name, softmax_finish<T, W>)
SOFTMAX(f32, float, 4)
SOFTMAX(f16, half, 8)
SOFTMAX(bf16, bfloat, 8)
