// AdamW over up to seven tensors.
#include <metal_stdlib>
#include "adamw/tensor_update.metal.h"
#include "common/kernel.metal.h"
using namespace metal;
using namespace torch_fused;

template <typename Pointer>
inline Pointer pick(uint i, Pointer p0, Pointer p1, Pointer p2, Pointer p3, Pointer p4, Pointer p5, Pointer p6) {
  return i < 4 ? (i < 2 ? (i == 0 ? p0 : p1) : (i == 2 ? p2 : p3)) : (i == 4 ? p4 : (i == 5 ? p5 : p6));
}

#define OPERANDS(i, P, S, b0, b1, b2, b3)                                                                            \
  device P* param##i [[buffer(b0)]], device const P* grad##i [[buffer(b1)]], device S* exp_avg##i [[buffer(b2)]],    \
      device S* exp_avg_sq##i [[buffer(b3)]]
#define PICK(name) \
  pick(stretch.tensor, name##0, name##1, name##2, name##3, name##4, name##5, name##6) + stretch.begin

// Parameters and gradients of type P, states of type S; W elements a thread, a pack of P.
template <typename P, typename S, int W>
[[kernel, max_total_threads_per_threadgroup(256)]]
void adamw(OPERANDS(0, P, S, 0, 1, 2, 3), OPERANDS(1, P, S, 4, 5, 6, 7), OPERANDS(2, P, S, 8, 9, 10, 11),
           OPERANDS(3, P, S, 12, 13, 14, 15), OPERANDS(4, P, S, 16, 17, 18, 19), OPERANDS(5, P, S, 20, 21, 22, 23),
           OPERANDS(6, P, S, 24, 25, 26, 27), device const AdamwNumbers* numbers [[buffer(28)]],
           constant AdamwParams& p [[buffer(29)]], uint group [[threadgroup_position_in_grid]],
           uint thread_id [[thread_position_in_threadgroup]]) {
  const Stretch stretch = stretch_of<W>(p, group);
  device S* exp_avg_sq = PICK(exp_avg_sq);
  update<P, S, W, false>(PICK(param), PICK(grad), PICK(exp_avg), exp_avg_sq, exp_avg_sq, thread_id * W, stretch.count,
                         stretch.aligned, numbers_of(p, numbers, stretch.tensor));
}

#define ADAMW(name, P, S, W) KERNEL("adamw_" #name, adamw<P, S, W>)
ADAMW(f32_f32, float, float, 4)
ADAMW(f16_f16, half, half, 8)
ADAMW(f16_f32, half, float, 8)
ADAMW(bf16_bf16, bfloat, bfloat, 8)
ADAMW(bf16_f32, bfloat, float, 8)
