// One threadgroup's elements of one tensor.
#pragma once
#include <metal_stdlib>
#include "adamw/adamw_params.h"
#include "common/pack.metal.h"
using namespace metal;
using namespace torch_fused;

// Which tensor of a launch a threadgroup works on, and the stretch of it.
struct Stretch {
  uint tensor;
  long begin;
  uint count;
  bool aligned;
};

template <int W>
inline Stretch stretch_of(constant AdamwParams& p, uint group) {
  uint tensor = 0;
#pragma unroll
  for (uint i = 1; i < TENSORS; i++) tensor += group >= p.first[i] ? 1 : 0;
  const long begin = long(group - p.first[tensor]) * (THREADS * W);
  const uint count = uint(min(p.numel[tensor] - begin, long(THREADS * W)));
  const Stretch stretch = {tensor, begin, count, (p.aligned >> tensor & 1) != 0};
  return stretch;
}

inline AdamwNumbers numbers_of(constant AdamwParams& p, device const AdamwNumbers* numbers, uint tensor) {
  if (p.has_numbers != 0) return numbers[p.first_number + tensor];
  const AdamwNumbers known = {{p.bias_correction2[tensor], p.negative_step_size[tensor], p.decay, p.gradient, p.lerp,
                               p.beta2, p.one_minus_beta2, p.eps},
                              0.0f};
  return known;
}

// W elements, the pack `at`, of operands that begin at the threadgroup's stretch. The maxima are of AMSGRAD only.
template <typename P, typename S, int W, bool AMSGRAD>
inline void update(device P* param, device const P* grad, device S* exp_avg, device S* exp_avg_sq,
                   device S* max_exp_avg_sq, uint at, uint count, bool aligned, AdamwNumbers numbers) {
  Pack<P, W> params, grads;
  Pack<S, W> exp_avgs, exp_avg_sqs, max_exp_avg_sqs;
  params.load(param, at, count, aligned);
  grads.load(grad, at, count, aligned);
  exp_avgs.load(exp_avg, at, count, aligned);
  exp_avg_sqs.load(exp_avg_sq, at, count, aligned);
  if (AMSGRAD) max_exp_avg_sqs.load(max_exp_avg_sq, at, count, aligned);
  if (numbers.skip != 0.0f) return;
  float w[W], g[W], m[W], v[W], largest[W];
  params.unpack(w);
  grads.unpack(g);
  exp_avgs.unpack(m);
  exp_avg_sqs.unpack(v);
  if (AMSGRAD) max_exp_avg_sqs.unpack(largest);
#pragma unroll
  for (int j = 0; j < W; j++) {
    const AdamwElement<float> x = {w[j], m[j], v[j], AMSGRAD ? largest[j] : 0.0f};
    const AdamwElement<float> y = adamw_update<AMSGRAD>(x, g[j], numbers.scalars);
    w[j] = y.param;
    m[j] = y.exp_avg;
    v[j] = y.exp_avg_sq;
    largest[j] = y.max_exp_avg_sq;
  }
  store_columns<W>(param, at, count, aligned, w);
  store_columns<W>(exp_avg, at, count, aligned, m);
  store_columns<W>(exp_avg_sq, at, count, aligned, v);
  if (AMSGRAD) store_columns<W>(max_exp_avg_sq, at, count, aligned, largest);
}
