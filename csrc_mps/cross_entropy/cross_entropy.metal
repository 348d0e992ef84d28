// Cross entropy of rows of logits, log(sum(exp(x))) - x[target], and its gradient in their place.
#include <metal_stdlib>
#include "common/kernel.metal.h"
#include "common/online.metal.h"
#include "common/pack.metal.h"
#include "common/reduce.metal.h"
#include "cross_entropy/cross_entropy_params.h"
#include "cross_entropy/row_loss.metal.h"
using namespace metal;
using namespace torch_fused;

// One threadgroup a row, which it reads once for the loss and once more for the gradient. A thread meets the same
// columns both times, so what one writes no other reads. A target that is no class makes NaN of all.
template <typename T, int W>
[[kernel, max_total_threads_per_threadgroup(512)]]
void cross_entropy(device T* logits [[buffer(0)]], device const long* target [[buffer(1)]],
                   device const float* scale [[buffer(2)]], device float* losses [[buffer(3)]],
                   constant CrossEntropyParams& p [[buffer(4)]], uint row [[threadgroup_position_in_grid]],
                   uint thread_id [[thread_position_in_threadgroup]], uint threads [[threads_per_threadgroup]],
                   uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                   uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float2 scratch[32];
  threadgroup float scratch_total[32];
  const Place place = {lane, simdgroup, simdgroups};
  device T* in = logits + long(row) * p.stride;
  const uint first = thread_id * W;
  const uint step = threads * W;
  const long index = target[row];
  float x[W];
  if (index == p.ignore_index) {
    if (thread_id == 0) losses[row] = 0.0f;
#pragma unroll
    for (int j = 0; j < W; j++) x[j] = 0.0f;
    for (uint column = first; p.scaled && column < p.cols; column += step) {
      store_columns<W>(in, column, p.cols, p.aligned, x);
    }
    return;
  }
  const bool is_class = index >= 0 && index < long(p.cols);
  const uint hit = is_class ? uint(index) : 0u;
  const bool writes_loss = hit / W % threads == thread_id;
  Online mine = {-INFINITY, 0.0f};
  float total = 0.0f;
  float of_target = NAN;
  for (uint column = first; column < p.cols; column += step) {
    load_columns<W>(in, column, p.cols, p.aligned, x, -INFINITY);
    mine.add<W>(x);
#pragma unroll
    for (int j = 0; j < W; j++) {
      if (column + j < p.cols) total += x[j];
      if (is_class && column + j == hit) of_target = x[j];
    }
  }
  const Online all = mine.of_simdgroup().of_threadgroup(scratch, place);
  if (p.smoothing > 0.0f) total = threadgroup_sum(total, scratch_total, place);
  if (writes_loss) losses[row] = loss_of_row(all, of_target, total, p.cols, p.smoothing, p.z_loss);
  if (!p.scaled) return;
  const float by = is_class ? scale[p.per_row ? row : 0] : NAN;
  const RowGradient gradient = RowGradient::of(all, by, p.cols, p.smoothing, p.z_loss);
  for (uint column = first; column < p.cols; column += step) {
    load_columns<W>(in, column, p.cols, p.aligned, x, -INFINITY);
#pragma unroll
    for (int j = 0; j < W; j++) x[j] = gradient.at(x[j], column + j == hit);
    store_columns<W>(in, column, p.cols, p.aligned, x);
  }
}

#define CROSS_ENTROPY(name, T, W) KERNEL("cross_entropy_" #name, cross_entropy<T, W>)
CROSS_ENTROPY(f32, float, 4)
CROSS_ENTROPY(f16, half, 8)
CROSS_ENTROPY(bf16, bfloat, 8)
