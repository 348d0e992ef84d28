// AdamW over up to seven tensors: four buffers each and the parameters are 29 of Metal's 31.
#include <metal_stdlib>
#include "adamw/adamw_params.h"
#include "adamw/update.h"
#include "common/pack.metal.h"
using namespace metal;
using namespace torch_fused;

template <typename Pointer>
inline Pointer pick(uint i, Pointer p0, Pointer p1, Pointer p2, Pointer p3, Pointer p4, Pointer p5, Pointer p6) {
  return i < 4 ? (i < 2 ? (i == 0 ? p0 : p1) : (i == 2 ? p2 : p3)) : (i == 4 ? p4 : (i == 5 ? p5 : p6));
}

#define OPERANDS(i, P, S, b0, b1, b2, b3)                                                                            \
  device P* param##i [[buffer(b0)]], device const P* grad##i [[buffer(b1)]], device S* exp_avg##i [[buffer(b2)]],    \
      device S* exp_avg_sq##i [[buffer(b3)]]
#define PICK(name) pick(tensor, name##0, name##1, name##2, name##3, name##4, name##5, name##6)

// Parameters and gradients of type P, states of type S; W elements a thread, a pack of P.
template <typename P, typename S, int W>
[[kernel, max_total_threads_per_threadgroup(256)]]
void adamw(OPERANDS(0, P, S, 0, 1, 2, 3), OPERANDS(1, P, S, 4, 5, 6, 7), OPERANDS(2, P, S, 8, 9, 10, 11),
           OPERANDS(3, P, S, 12, 13, 14, 15), OPERANDS(4, P, S, 16, 17, 18, 19), OPERANDS(5, P, S, 20, 21, 22, 23),
           OPERANDS(6, P, S, 24, 25, 26, 27), constant AdamwParams& p [[buffer(28)]],
           uint group [[threadgroup_position_in_grid]], uint thread_id [[thread_position_in_threadgroup]]) {
  uint tensor = 0;
#pragma unroll
  for (uint i = 1; i < TENSORS; i++) tensor += group >= p.first[i] ? 1 : 0;
  const long begin = long(group - p.first[tensor]) * (THREADS * W);
  const uint count = uint(min(p.numel[tensor] - begin, long(THREADS * W)));
  const bool aligned = (p.aligned >> tensor & 1) != 0;
  const uint at = thread_id * W;
  device P* param = PICK(param) + begin;
  device const P* grad = PICK(grad) + begin;
  device S* exp_avg = PICK(exp_avg) + begin;
  device S* exp_avg_sq = PICK(exp_avg_sq) + begin;

  Pack<P, W> params, grads;
  Pack<S, W> exp_avgs, exp_avg_sqs;
  params.load(param, at, count, aligned);
  grads.load(grad, at, count, aligned);
  exp_avgs.load(exp_avg, at, count, aligned);
  exp_avg_sqs.load(exp_avg_sq, at, count, aligned);
  float w[W], g[W], m[W], v[W];
  params.unpack(w);
  grads.unpack(g);
  exp_avgs.unpack(m);
  exp_avg_sqs.unpack(v);
  const AdamwScalars<float> scalars = {p.bias_correction2[tensor], p.negative_step_size[tensor], p.decay, p.sign,
                                       p.lerp, p.beta2, p.one_minus_beta2, p.eps};
#pragma unroll
  for (int j = 0; j < W; j++) {
    const AdamwElement<float> x = {w[j], m[j], v[j]};
    const AdamwElement<float> y = adamw_update(x, g[j], scalars);
    w[j] = y.param;
    m[j] = y.exp_avg;
    v[j] = y.exp_avg_sq;
  }
  store_columns<W>(param, at, count, aligned, w);
  store_columns<W>(exp_avg, at, count, aligned, m);
  store_columns<W>(exp_avg_sq, at, count, aligned, v);
}

#define TYPES(P, S) device P*, device const P*, device S*, device S*
#define ADAMW(name, P, S, W)                                                                                         \
  template [[host_name("adamw_" #name)]] [[kernel]] void adamw<P, S, W>(                                             \
      TYPES(P, S), TYPES(P, S), TYPES(P, S), TYPES(P, S), TYPES(P, S), TYPES(P, S), TYPES(P, S),                     \
      constant AdamwParams&, uint, uint);
ADAMW(f32_f32, float, float, 4)
ADAMW(f16_f16, half, half, 8)
ADAMW(f16_f32, half, float, 8)
ADAMW(bf16_bf16, bfloat, bfloat, 8)
ADAMW(bf16_f32, bfloat, float, 8)
