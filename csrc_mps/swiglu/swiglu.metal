// The activation of SwiGLU and its relatives, y = activation(gate) * up, and its gradients.
#include <metal_stdlib>
#include "common/activation.metal.h"
#include "common/kernel.metal.h"
#include "common/pack.metal.h"
#include "swiglu/swiglu_params.h"
using namespace metal;
using namespace torch_fused;

// The columns of a row that one threadgroup covers, a pack of W a thread.
template <int W>
struct Span {
  long row;
  long start;  // the threadgroup's first column
  uint cols;   // how many of the row's columns are left from there, as far as the threadgroup reaches
  uint column; // of this thread's pack, counted from start

  Span(constant SwigluParams& p, uint group, uint thread_id, uint threads) {
    row = group / p.groups;
    start = long(group % p.groups) * long(threads * W);
    cols = uint(min(p.cols - start, long(threads * W)));
    column = thread_id * W;
  }
};

template <uint A, typename T, int W>
[[kernel, max_total_threads_per_threadgroup(256)]]
void gated(device const T* gate [[buffer(0)]], device const T* up [[buffer(1)]], device T* output [[buffer(2)]],
           constant SwigluParams& p [[buffer(3)]], uint group [[threadgroup_position_in_grid]],
           uint thread_id [[thread_position_in_threadgroup]], uint threads [[threads_per_threadgroup]]) {
  const Span<W> at(p, group, thread_id, threads);
  Pack<T, W> gates, ups;
  gates.load(gate + at.row * p.gate_stride + at.start, at.column, at.cols, p.flags & ALIGNED);
  ups.load(up + at.row * p.up_stride + at.start, at.column, at.cols, p.flags & ALIGNED);
  float g[W], u[W], y[W];
  gates.unpack(g);
  ups.unpack(u);
#pragma unroll
  for (int j = 0; j < W; j++) {
    const float activated = activate(g[j], A);
    y[j] = (p.flags & LLAMA ? float(T(activated)) : activated) * u[j];
  }
  store_columns<W>(output + at.row * p.cols + at.start, at.column, at.cols, p.flags & ALIGNED, y);
}

template <uint A, typename T, int W>
[[kernel, max_total_threads_per_threadgroup(256)]]
void gated_backward(device const T* grad [[buffer(0)]], device const T* gate [[buffer(1)]],
                    device const T* up [[buffer(2)]], device T* grad_gate [[buffer(3)]],
                    device T* grad_up [[buffer(4)]], constant SwigluParams& p [[buffer(5)]],
                    uint group [[threadgroup_position_in_grid]], uint thread_id [[thread_position_in_threadgroup]],
                    uint threads [[threads_per_threadgroup]]) {
  const Span<W> at(p, group, thread_id, threads);
  Pack<T, W> grads, gates, ups;
  grads.load(grad + at.row * p.grad_stride + at.start, at.column, at.cols, p.flags & ALIGNED);
  gates.load(gate + at.row * p.gate_stride + at.start, at.column, at.cols, p.flags & ALIGNED);
  ups.load(up + at.row * p.up_stride + at.start, at.column, at.cols, p.flags & ALIGNED);
  float dy[W], g[W], u[W];
  grads.unpack(dy);
  gates.unpack(g);
  ups.unpack(u);
#pragma unroll
  for (int j = 0; j < W; j++) {
    const ValueAndSlope activated = activate_with_slope(g[j], A);
    u[j] = dy[j] * u[j] * activated.slope;
    dy[j] *= activated.value;
  }
  store_columns<W>(grad_gate + at.row * p.cols + at.start, at.column, at.cols, p.flags & ALIGNED, u);
  store_columns<W>(grad_up + at.row * p.cols + at.start, at.column, at.cols, p.flags & ALIGNED, dy);
}

#define GATED(host, A, name, T, W)                           \
  KERNEL(host "_" #name, gated<A, T, W>)                     \
  KERNEL(host "_backward_" #name, gated_backward<A, T, W>)
#define GATED_OF(host, A)       \
  GATED(host, A, f32, float, 4) \
  GATED(host, A, f16, half, 8)  \
  GATED(host, A, bf16, bfloat, 8)
GATED_OF("silu_mul", kSilu)
GATED_OF("gelu_mul", kGelu)
GATED_OF("gelu_mul_tanh", kGeluTanh)
