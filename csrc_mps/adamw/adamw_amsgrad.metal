// AdamW with AMSGrad over up to five tensors.
#include <metal_stdlib>
#include "adamw/tensor_update.metal.h"
#include "common/kernel.metal.h"
using namespace metal;
using namespace torch_fused;

template <typename Pointer>
inline Pointer pick(uint i, Pointer p0, Pointer p1, Pointer p2, Pointer p3, Pointer p4) {
  return i < 2 ? (i == 0 ? p0 : p1) : (i == 2 ? p2 : (i == 3 ? p3 : p4));
}

#define OPERANDS(i, P, S, b0, b1, b2, b3, b4)                                                                        \
  device P* param##i [[buffer(b0)]], device const P* grad##i [[buffer(b1)]], device S* exp_avg##i [[buffer(b2)]],    \
      device S* exp_avg_sq##i [[buffer(b3)]], device S* max_exp_avg_sq##i [[buffer(b4)]]
#define PICK(name) pick(stretch.tensor, name##0, name##1, name##2, name##3, name##4) + stretch.begin

// As adamw.
template <typename P, typename S, int W>
[[kernel, max_total_threads_per_threadgroup(256)]]
void adamw_amsgrad(OPERANDS(0, P, S, 0, 1, 2, 3, 4), OPERANDS(1, P, S, 5, 6, 7, 8, 9),
                   OPERANDS(2, P, S, 10, 11, 12, 13, 14), OPERANDS(3, P, S, 15, 16, 17, 18, 19),
                   OPERANDS(4, P, S, 20, 21, 22, 23, 24), device const AdamwNumbers* numbers [[buffer(25)]],
                   constant AdamwParams& p [[buffer(26)]], uint group [[threadgroup_position_in_grid]],
                   uint thread_id [[thread_position_in_threadgroup]]) {
  const Stretch stretch = stretch_of<W>(p, group);
  update<P, S, W, true>(PICK(param), PICK(grad), PICK(exp_avg), PICK(exp_avg_sq), PICK(max_exp_avg_sq), thread_id * W,
                        stretch.count, stretch.aligned, numbers_of(p, numbers, stretch.tensor));
}

#define AMSGRAD(name, P, S, W) KERNEL("adamw_amsgrad_" #name, adamw_amsgrad<P, S, W>)
AMSGRAD(f32_f32, float, float, 4)
AMSGRAD(f16_f16, half, half, 8)
AMSGRAD(f16_f32, half, float, 8)
AMSGRAD(bf16_bf16, bfloat, bfloat, 8)
AMSGRAD(bf16_f32, bfloat, float, 8)
