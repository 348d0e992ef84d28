// A mixture of experts: the choice of a token's experts, their products, and their sum.
#include <metal_stdlib>
#include "common/kernel.metal.h"
#include "decode/multiply.metal.h"
using namespace metal;
using namespace torch_fused;

// A simdgroup a token. Lane k of it keeps the weight of the token's expert k.
[[kernel, max_total_threads_per_threadgroup(32)]]
void decode_choose(device const float* routes [[buffer(0)]], device int* experts [[buffer(1)]],
                   device float* weights [[buffer(2)]], constant ChooseParams& p [[buffer(3)]],
                   uint token [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
  constexpr uint EACH = kMostExperts / 32;
  previous_launch_done(lane);
  device const float* logits = routes + ulong(token) * p.stride;
  float mine[EACH], largest = -INFINITY, sum = 0.0f;
#pragma unroll
  for (uint i = 0; i < EACH; i++) {
    mine[i] = lane + 32 * i < p.experts ? logits[lane + 32 * i] : -INFINITY;
    largest = max(largest, mine[i]);
  }
  largest = simd_max(largest);
#pragma unroll
  for (uint i = 0; i < EACH; i++) {
    const bool there = lane + 32 * i < p.experts;
    mine[i] = there ? exp(mine[i] - largest) : -1.0f;
    sum += there ? mine[i] : 0.0f;
  }
  sum = simd_sum(sum);
  float weight = 0.0f, total = 0.0f;
  uint expert = 0;
  for (uint k = 0; k < p.chosen; k++) {
    float best = -1.0f;
    uint where = kMostExperts;
#pragma unroll
    for (uint i = 0; i < EACH; i++) {
      if (mine[i] > best) {
        best = mine[i];
        where = lane + 32 * i;
      }
    }
    const float value = simd_max(best);
    where = min(simd_min(best == value ? where : kMostExperts), p.experts - 1);  // NaN is no choice
#pragma unroll
    for (uint i = 0; i < EACH; i++) {
      if (lane + 32 * i == where) mine[i] = -1.0f;
    }
    const float probability = isfinite(sum) ? value / sum : NAN;
    total += probability;
    if (lane == k) {
      weight = probability;
      expert = where;
    }
  }
  if (lane >= p.chosen) return;
  experts[token * p.chosen + lane] = int(expert);
  weights[token * p.chosen + lane] = p.normalise ? weight / total : weight;
}

// Rows of the matrices of each token's experts, one after the other, with the token's vector, or with one of their own.
template <typename T, int R, int U, bool GATED, bool WHOLE>
[[kernel, max_total_threads_per_threadgroup(256)]]
void decode_experts(device const T* w0 [[buffer(0)]], device const T* w1 [[buffer(1)]],
                    device const int* experts [[buffer(2)]], device const float* vectors [[buffer(3)]],
                    device const ushort* norm [[buffer(4)]], device float* results [[buffer(5)]],
                    constant ExpertsParams& p [[buffer(6)]], uint group [[threadgroup_position_in_grid]],
                    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                    uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup Shared<1> shared;
  previous_launch_done(lane);
  const uint choice = group / p.groups;
  const long expert = experts[choice];
  Rows<T, R, U> rows;
  rows.w0 = rows.w2 = w0 + expert * p.expert_strides[0];
  rows.w1 = w1 + expert * p.expert_strides[1];
  rows.s0 = rows.s2 = p.product.strides[0], rows.s1 = p.product.strides[1];
  multiply<T, 1, R, U, kLaneColumns, GATED, WHOLE>(
      rows, norm, norm, norm, vectors + ulong(choice / p.shared_by) * p.product.cols, norm,
      results + ulong(choice) * p.product.result_stride, p.product, shared, group % p.groups, lane, simdgroup,
      simdgroups);
}

[[kernel, max_total_threads_per_threadgroup(256)]]
void decode_expert_sum(device const float* outputs [[buffer(0)]], device const float* weights [[buffer(1)]],
                       device const float* shared_output [[buffer(2)]], device const float* routes [[buffer(3)]],
                       device float* states [[buffer(4)]], constant ExpertSumParams& p [[buffer(5)]],
                       uint token [[threadgroup_position_in_grid]], uint thread_id [[thread_position_in_threadgroup]],
                       uint lane [[thread_index_in_simdgroup]]) {
  previous_launch_done(lane);
  const ulong first = ulong(token) * p.cols;
  float gate = p.flags & kSharedExpert ? 1.0f : 0.0f;
  if (p.flags & kSharedGate) gate = 1.0f / (1.0f + exp(-routes[token * p.stride + p.gate]));
  for (uint i = thread_id; i < p.cols; i += 256) {
    float sum = p.flags & kSharedExpert ? gate * shared_output[first + i] : 0.0f;
    for (uint k = 0; k < p.chosen; k++) {
      const uint choice = token * p.chosen + k;
      sum = fma(weights[choice], outputs[ulong(choice) * p.cols + i], sum);
    }
    states[first + i] = fma(sum, p.scale, states[first + i]);
  }
}

#define EXPERTS(name, T)                                                          \
  KERNEL("decode_experts_" #name "_1", decode_experts<T, 2, 4, false, true>)      \
  KERNEL("decode_experts_" #name "_0", decode_experts<T, 2, 1, false, false>)     \
  KERNEL("decode_experts_gated_" #name "_1", decode_experts<T, 4, 2, true, true>) \
  KERNEL("decode_experts_gated_" #name "_0", decode_experts<T, 2, 1, true, false>)
EXPERTS(f32, float)
EXPERTS(f16, half)
EXPERTS(bf16, bfloat)
