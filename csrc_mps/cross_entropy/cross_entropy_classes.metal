// Cross entropy of rows of logits that come in chunks of classes: the sums of a row over all chunks, of which its loss
// is made, and then its gradient in the place of each chunk.
#include <metal_stdlib>
#include "common/kernel.metal.h"
#include "common/online.metal.h"
#include "common/pack.metal.h"
#include "common/reduce.metal.h"
#include "cross_entropy/cross_entropy_classes_params.h"
#include "cross_entropy/row_loss.metal.h"
using namespace metal;
using namespace torch_fused;

// What is known of a row after some chunks: its Online sum, the sum of its logits, and the target's logit, NaN until it
// is met. A target that is no class never is.
struct RowSums {
  Online exps;
  float total;
  float of_target;

  static RowSums of(float4 packed) { return {{packed.x, packed.y}, packed.z, packed.w}; }
  float4 packed() const { return float4(exps.largest, exps.sum, total, of_target); }
};

// The target's column in the chunk, past the end if it is in another one.
inline uint column_of(long index, constant CrossEntropyClassesParams& p) {
  const bool is_here = index >= long(p.begin) && index < long(p.begin) + long(p.cols);
  return is_here ? uint(index - long(p.begin)) : p.cols;
}

// One threadgroup a row, of which each thread loads N packs at once. Adds a chunk to the row's sums, which the first
// chunk begins; the last one gives the loss.
template <typename T, int W, int N>
[[kernel, max_total_threads_per_threadgroup(512)]]
void cross_entropy_sums(device const T* logits [[buffer(0)]], device const long* target [[buffer(1)]],
                        device float4* sums [[buffer(2)]], device float* losses [[buffer(3)]],
                        constant CrossEntropyClassesParams& p [[buffer(4)]], uint row [[threadgroup_position_in_grid]],
                        uint thread_id [[thread_position_in_threadgroup]], uint threads [[threads_per_threadgroup]],
                        uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                        uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float2 scratch[32];
  threadgroup float scratch_total[32];
  const Place place = {lane, simdgroup, simdgroups};
  device const T* in = logits + long(row) * p.stride;
  const long index = target[row];
  if (index == p.ignore_index) {
    if (thread_id == 0) losses[row] = 0.0f;
    return;
  }
  const uint hit = column_of(index, p);
  RowSums all = {{-INFINITY, 0.0f}, 0.0f, NAN};
  if (thread_id == 0) {
    if (p.begin > 0) all = RowSums::of(sums[row]);
    if (hit < p.cols) all.of_target = float(in[hit]);
  }
  Online mine = {-INFINITY, 0.0f};
  float total = 0.0f;
  const uint step = threads * W;
  for (uint column = thread_id * W; column < p.cols; column += N * step) {
    Pack<T, W> packs[N];
    float x[N * W];
#pragma unroll
    for (int i = 0; i < N; i++) packs[i].load(in, column + i * step, p.cols, true, -INFINITY);
#pragma unroll
    for (int i = 0; i < N; i++) packs[i].unpack(x + i * W);
    mine.add<N * W>(x);
    if (p.smoothing > 0.0f) {
#pragma unroll
      for (int i = 0; i < N; i++) {
#pragma unroll
        for (int j = 0; j < W; j++) total += column + i * step + j < p.cols ? x[i * W + j] : 0.0f;
      }
    }
  }
  const Online chunk = mine.of_simdgroup().of_threadgroup(scratch, place);
  if (p.smoothing > 0.0f) total = threadgroup_sum(total, scratch_total, place);
  if (thread_id != 0) return;
  all.exps = all.exps.with(chunk);
  all.total += total;
  sums[row] = all.packed();
  if (p.begin + p.cols < p.classes) return;
  losses[row] = loss_of_row(all.exps, all.of_target, all.total, p.classes, p.smoothing, p.z_loss);
}

// One threadgroup a row. The logits of a chunk become the gradient of the row's loss times its scale. What is left of
// the row's last pack becomes 0, as products may read it.
template <typename T, int W, int N>
[[kernel, max_total_threads_per_threadgroup(512)]]
void cross_entropy_gradient(device T* logits [[buffer(0)]], device const long* target [[buffer(1)]],
                            device const float4* sums [[buffer(2)]], device const float* scale [[buffer(3)]],
                            constant CrossEntropyClassesParams& p [[buffer(4)]],
                            uint row [[threadgroup_position_in_grid]],
                            uint thread_id [[thread_position_in_threadgroup]],
                            uint threads [[threads_per_threadgroup]]) {
  device T* in = logits + long(row) * p.stride;
  const long index = target[row];
  const uint step = threads * W;
  float x[W];
  if (index == p.ignore_index) {
#pragma unroll
    for (int j = 0; j < W; j++) x[j] = 0.0f;
    for (uint column = thread_id * W; column < p.cols; column += step) {
      store_columns<W>(in, column, p.stride, true, x);
    }
    return;
  }
  const float by = index >= 0 && index < long(p.classes) ? scale[p.per_row ? row : 0] : NAN;
  const RowGradient gradient = RowGradient::of(RowSums::of(sums[row]).exps, by, p.classes, p.smoothing, p.z_loss);
  const uint hit = column_of(index, p);
  for (uint column = thread_id * W; column < p.cols; column += N * step) {
    Pack<T, W> packs[N];
#pragma unroll
    for (int i = 0; i < N; i++) packs[i].load(in, column + i * step, p.cols, true);
#pragma unroll
    for (int i = 0; i < N; i++) {
      const uint first = column + i * step;
      packs[i].unpack(x);
#pragma unroll
      for (int j = 0; j < W; j++) x[j] = first + j < p.cols ? gradient.at(x[j], first + j == hit) : 0.0f;
      store_columns<W>(in, first, p.stride, true, x);
    }
  }
}

#define CROSS_ENTROPY_SUMS(name, T) KERNEL("cross_entropy_sums_" #name, cross_entropy_sums<T, 8, 4>)
CROSS_ENTROPY_SUMS(f16, half)
CROSS_ENTROPY_SUMS(bf16, bfloat)
#define CROSS_ENTROPY_GRADIENT(name, T) KERNEL("cross_entropy_gradient_" #name, cross_entropy_gradient<T, 8, 4>)
CROSS_ENTROPY_GRADIENT(f16, half)
CROSS_ENTROPY_GRADIENT(bf16, bfloat)
