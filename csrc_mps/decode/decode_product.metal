// Products of dense matrices' rows with the vectors of a step, and the rows of a dense embedding.
#include <metal_stdlib>
#include "common/kernel.metal.h"
#include "decode/multiply.metal.h"
using namespace metal;
using namespace torch_fused;

template <typename T, int C, int R, int U, bool GATED, bool WHOLE>
[[kernel, max_total_threads_per_threadgroup(256)]]
void decode_product(device const T* w0 [[buffer(0)]], device const T* w1 [[buffer(1)]],
                    device const T* w2 [[buffer(2)]], device const ushort* b0 [[buffer(3)]],
                    device const ushort* b1 [[buffer(4)]], device const ushort* b2 [[buffer(5)]],
                    device const float* vectors [[buffer(6)]], device const ushort* norm [[buffer(7)]],
                    device float* results [[buffer(8)]], constant ProductParams& p [[buffer(9)]],
                    uint group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
                    uint simdgroup [[simdgroup_index_in_threadgroup]],
                    uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup Shared<C> shared;
  Rows<T, R, U> rows;
  rows.w0 = w0, rows.w1 = w1, rows.w2 = w2;
  rows.s0 = p.strides[0], rows.s1 = p.strides[1], rows.s2 = p.strides[2];
  multiply<T, C, R, U, kLaneColumns, GATED, WHOLE>(rows, b0, b1, b2, vectors, norm, results, p, shared, group, lane,
                                                   simdgroup, simdgroups);
}

// One row of the embedding per token; NaN for a token that is not in it.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(256)]]
void decode_embed(device const T* embedding [[buffer(0)]], device const long* token_ids [[buffer(1)]],
                  device float* states [[buffer(2)]], constant EmbedParams& p [[buffer(3)]],
                  uint token [[threadgroup_position_in_grid]], uint thread_id [[thread_position_in_threadgroup]],
                  uint threads [[threads_per_threadgroup]]) {
  const long id = token_ids[token];
  const bool known = id >= 0 && id < long(p.vocabulary);
  for (uint i = thread_id; i < p.hidden; i += threads) {
    states[ulong(token) * p.hidden + i] = known ? float(embedding[id * p.stride + i]) * p.scale : NAN;
  }
}

// The RMS norm of some floats of each token, one threadgroup per token.
[[kernel, max_total_threads_per_threadgroup(256)]]
void decode_norm(device const float* from [[buffer(0)]], device const ushort* norm [[buffer(1)]],
                 device float* to [[buffer(2)]], constant StepNormParams& p [[buffer(3)]],
                 uint token [[threadgroup_position_in_grid]], uint thread_id [[thread_position_in_threadgroup]],
                 uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup float squares[8];
  device const float* x = from + ulong(token) * p.from_stride;
  device float* y = to + ulong(token) * p.to_stride;
  previous_launch_done(lane);
  float sum = 0.0f;
  for (uint i = thread_id; i < p.cols; i += 256) sum = fma(x[i], x[i], sum);
  sum = simd_sum(sum);
  if (lane == 0) squares[simdgroup] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  sum = simd_sum(lane < 8 ? squares[lane] : 0.0f);
  const float scale = rsqrt(sum / float(p.cols) + p.eps) * p.scale;
  for (uint i = thread_id; i < p.cols; i += 256) {
    const float normed = x[i] * scale * (vector_at<float, false>(norm, p.norm_format, i) + p.norm_offset);
    y[i] = p.flags & kAdd ? y[i] + normed : normed;
  }
}

// The end of the gated products, if adapters come before it.
[[kernel, max_total_threads_per_threadgroup(256)]]
void decode_gate(device float* gates [[buffer(0)]], device const float* ups [[buffer(1)]],
                 constant GateParams& p [[buffer(2)]], uint group [[threadgroup_position_in_grid]],
                 uint thread_id [[thread_position_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  previous_launch_done(lane);
  const uint i = group * 256 + thread_id;
  if (i < p.count) gates[i] = activate(gates[i], p.activation) * ups[i];
}

#define PRODUCTS(name, T)                                                        \
  KERNEL("decode_product_" #name "_1", decode_product<T, 1, 2, 4, false, true>)  \
  KERNEL("decode_product_" #name "_0", decode_product<T, 1, 2, 1, false, false>) \
  KERNEL("decode_gated_" #name "_1", decode_product<T, 1, 4, 2, true, true>)     \
  KERNEL("decode_gated_" #name "_0", decode_product<T, 1, 2, 1, true, false>)    \
  KERNEL("decode_embed_" #name, decode_embed<T>)
// decode_tiles.metal has those of 16-bit matrices with several vectors.
#define SEVERAL(name, T)                                                        \
  KERNEL("decode_product_" #name "_8", decode_product<T, 8, 4, 1, false, true>) \
  KERNEL("decode_gated_" #name "_8", decode_product<T, 8, 4, 1, true, true>)
PRODUCTS(f32, float)
SEVERAL(f32, float)
PRODUCTS(f16, half)
PRODUCTS(bf16, bfloat)
