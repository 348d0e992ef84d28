// The product after attention with a dense matrix.
#include <metal_stdlib>
#include "common/kernel.metal.h"
#include "decode/attended.metal.h"
using namespace metal;
using namespace torch_fused;

template <typename T, int C, int R, int U, bool WHOLE>
[[kernel, max_total_threads_per_threadgroup(128)]]
void decode_attended(device const T* matrix [[buffer(0)]], device const ushort* bias [[buffer(1)]],
                     device const float* chunks [[buffer(2)]], device const float2* stats [[buffer(3)]],
                     device float* results [[buffer(4)]], constant AttendedParams& p [[buffer(5)]],
                     uint group [[threadgroup_position_in_grid]], uint thread_id [[thread_position_in_threadgroup]],
                     uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup Combined<C, U> combined;
  Rows<T, R, U> rows;
  rows.w0 = rows.w1 = rows.w2 = matrix;
  rows.s0 = rows.s1 = rows.s2 = p.stride;
  multiply_attended<T, C, R, U, WHOLE>(rows, bias, chunks, stats, results, p, combined, group, thread_id, lane,
                                       simdgroup);
}

#define ATTENDED(name, T)                                                  \
  KERNEL("decode_attended_" #name "_1", decode_attended<T, 1, 4, 4, true>) \
  KERNEL("decode_attended_" #name "_8", decode_attended<T, 8, 4, 2, true>) \
  KERNEL("decode_attended_" #name "_0", decode_attended<T, 1, 4, 4, false>)
ATTENDED(f32, float)
ATTENDED(f16, half)
ATTENDED(bf16, bfloat)
