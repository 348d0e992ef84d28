// Products of packed matrices' rows with the vectors of a step, and the rows of a packed embedding. One source per
// number of bits instantiates them.
#pragma once
#include <metal_stdlib>
#include "common/kernel.metal.h"
#include "decode/attended.metal.h"
#include "decode/multiply.metal.h"
#include "quantized/packed.metal.h"
using namespace metal;
using namespace torch_fused;

// As Rows, of packed matrices with BITS bits a column. T is the type of scales, biases, norms.
template <typename T, int BITS, int R, int U, int N, bool WHOLE>
struct PackedRows {
  device const uint *w0, *w1, *w2;
  device const ushort *s0, *s1, *s2;  // scales
  device const ushort *g0, *g1, *g2;  // biases of groups
  constant PackedFormat* format;
  uint column;  // where the rows stand
  PackedRow at[R];
  PackedPack<BITS, N, T> packs[R][U];

  PackedGroups<T, WHOLE> groups() const { return packed_groups<T, WHOLE>(format->group_size, format->scale_format); }

  void point(int r, uint of, uint row) {
    at[r] =
        packed_row(of == 0   ? w0
                   : of == 1 ? w1
                             : w2,
                   of == 0   ? s0
                   : of == 1 ? s1
                             : s2,
                   of == 0   ? g0
                   : of == 1 ? g1
                             : g2,
                   row, format->strides[of], format->scale_strides[of], format->bias_strides[of], groups());
  }
};

template <typename T, int BITS, int R, int U, int N, bool WHOLE>
inline void read_format(thread PackedRows<T, BITS, R, U, N, WHOLE>& rows, constant PackedFormat& format) {
  rows.format = &format;
  rows.column = 0;
}

template <bool, typename T, int BITS, int R, int U, int N, bool WHOLE>
inline void load_rows(thread PackedRows<T, BITS, R, U, N, WHOLE>& rows, uint column, uint cols) {
  const PackedGroups<T, WHOLE> groups = rows.groups();
#pragma unroll
  for (int r = 0; r < R; r++) move_on<BITS>(rows.at[r], column - rows.column, groups);
  rows.column = column;
#pragma unroll
  for (int u = 0; u < U; u++) {
#pragma unroll
    for (int r = 0; r < R; r++) {
      load_packed<BITS, N, WHOLE>(rows.at[r], u * 32 * N, column + u * 32 * N < cols, groups, rows.packs[r][u]);
    }
  }
}

template <int R, int U, typename T, int BITS, int N, bool WHOLE>
inline void add_products(thread const PackedRows<T, BITS, R, U, N, WHOLE>& rows, int u, thread const float* x,
                         thread float (&sums)[R]) {
  add_products(rows.packs, u, x, rows.format->one, sums);
}

// After the products with one vector: those that are no numbers again, weight by weight, from the lane's first column on.
template <bool, typename T, int BITS, int R, int U, int N, bool WHOLE>
inline void multiply_again(thread PackedRows<T, BITS, R, U, N, WHOLE>& rows, device const float* source,
                           device const ushort* norm, uint first, uint step, constant ProductParams& p,
                           thread float (&sums)[R]) {
  float all = 0.0f;
#pragma unroll
  for (int r = 0; r < R; r++) all += sums[r];
  if (isfinite(all)) return;
  const PackedGroups<T, WHOLE> groups = rows.groups();
#pragma unroll
  for (int r = 0; r < R; r++) {
    if (isfinite(sums[r])) continue;
    const PackedRow row = moved_back<BITS>(rows.at[r], rows.column, groups);
    sums[r] = 0.0f;
#pragma unroll 1
    for (uint begin = first; begin < p.cols; begin += step) {
#pragma unroll 1
      for (uint column = begin; column < min(begin + U * 32 * N, p.cols); column += 32 * N) {
        float x[N];
        load_vector<T, N, WHOLE>(source, norm, column, p, x);
        PackedPack<BITS, N, T> pack;
        load_packed<BITS, N, WHOLE>(row, column, true, groups, pack);
        sums[r] += pack.exact_product(x);
      }
    }
  }
}

template <typename T, int BITS, int C, int R, int U, int N, bool GATED, bool WHOLE>
[[kernel, max_total_threads_per_threadgroup(256)]]
void decode_packed(device const uint* w0 [[buffer(0)]], device const uint* w1 [[buffer(1)]],
                   device const uint* w2 [[buffer(2)]], device const ushort* s0 [[buffer(3)]],
                   device const ushort* s1 [[buffer(4)]], device const ushort* s2 [[buffer(5)]],
                   device const ushort* g0 [[buffer(6)]], device const ushort* g1 [[buffer(7)]],
                   device const ushort* g2 [[buffer(8)]], device const ushort* b0 [[buffer(9)]],
                   device const ushort* b1 [[buffer(10)]], device const ushort* b2 [[buffer(11)]],
                   device const float* vectors [[buffer(12)]], device const ushort* norm [[buffer(13)]],
                   device float* results [[buffer(14)]], constant PackedProductParams& p [[buffer(15)]],
                   uint group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
                   uint simdgroup [[simdgroup_index_in_threadgroup]], uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup Shared<C> shared;
  PackedRows<T, BITS, R, U, N, WHOLE> rows;
  rows.w0 = w0, rows.w1 = w1, rows.w2 = w2;
  rows.s0 = s0, rows.s1 = s1, rows.s2 = s2;
  rows.g0 = g0, rows.g1 = g1, rows.g2 = g2;
  read_format(rows, p.format);
  multiply<T, C, R, U, N, GATED, WHOLE>(rows, b0, b1, b2, vectors, norm, results, p.product, shared, group, lane,
                                        simdgroup, simdgroups);
}

template <typename T, int BITS, int C, int R, int U, bool WHOLE>
[[kernel, max_total_threads_per_threadgroup(128)]]
void decode_packed_attended(device const uint* matrix [[buffer(0)]], device const ushort* scales [[buffer(1)]],
                            device const ushort* biases [[buffer(2)]], device const ushort* bias [[buffer(3)]],
                            device const float* chunks [[buffer(4)]], device const float2* stats [[buffer(5)]],
                            device float* results [[buffer(6)]], constant PackedAttendedParams& p [[buffer(7)]],
                            uint group [[threadgroup_position_in_grid]],
                            uint thread_id [[thread_position_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                            uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup Combined<C, U> combined;
  PackedRows<T, BITS, R, U, kLaneColumns, WHOLE> rows;
  rows.w0 = rows.w1 = rows.w2 = matrix;
  rows.s0 = rows.s1 = rows.s2 = scales;
  rows.g0 = rows.g1 = rows.g2 = biases;
  read_format(rows, p.format);
  multiply_attended<T, C, R, U, WHOLE>(rows, bias, chunks, stats, results, p.attended, combined, group, thread_id, lane,
                                       simdgroup);
}

// One row of the embedding per token; NaN for a token that is not in it.
template <int BITS>
[[kernel, max_total_threads_per_threadgroup(256)]]
void decode_packed_embed(device const uint* words [[buffer(0)]], device const ushort* scales [[buffer(1)]],
                         device const ushort* biases [[buffer(2)]], device const long* token_ids [[buffer(3)]],
                         device float* states [[buffer(4)]], constant PackedEmbedParams& p [[buffer(5)]],
                         uint token [[threadgroup_position_in_grid]], uint thread_id [[thread_position_in_threadgroup]],
                         uint threads [[threads_per_threadgroup]]) {
  const long id = token_ids[token];
  const bool known = id >= 0 && id < long(p.embed.vocabulary);
  constant PackedFormat& f = p.format;
  const PackedGroups<float, false> groups = packed_groups<float, false>(f.group_size, f.scale_format);
  const PackedRow row = packed_row(words, scales, biases, known ? id : 0, f.strides[0], f.scale_strides[0],
                                   f.bias_strides[0], groups);
  for (uint column = thread_id * kLaneColumns; column < p.embed.hidden; column += threads * kLaneColumns) {
    PackedPack<BITS, kLaneColumns> pack;
    load_packed<BITS, kLaneColumns, false>(row, column, true, groups, pack);
#pragma unroll
    for (uint j = 0; j < kLaneColumns; j++) {
      states[ulong(token) * p.embed.hidden + column + j] = known ? pack.get(j) * p.embed.scale : NAN;
    }
  }
}

// One vector: a lane takes sixteen columns at once, several: eight.
#define PACKED(name, T, BITS)                                                                           \
  KERNEL("decode_packed" #BITS "_" #name "_1", decode_packed<T, BITS, 1, 4, 1, 16, false, true>)        \
  KERNEL("decode_packed" #BITS "_" #name "_8", decode_packed<T, BITS, 8, 4, 1, 8, false, true>)         \
  KERNEL("decode_packed" #BITS "_gated_" #name "_1", decode_packed<T, BITS, 1, 4, 2, 16, true, true>)   \
  KERNEL("decode_packed" #BITS "_gated_" #name "_8", decode_packed<T, BITS, 8, 4, 1, 8, true, true>)    \
  KERNEL("decode_packed" #BITS "_attended_" #name "_1", decode_packed_attended<T, BITS, 1, 4, 4, true>) \
  KERNEL("decode_packed" #BITS "_attended_" #name "_8", decode_packed_attended<T, BITS, 8, 4, 2, true>)
// Scales, biases and norms of any types.
#define PACKED_ANY(BITS)                                                                               \
  KERNEL("decode_packed" #BITS "_f32_0", decode_packed<float, BITS, 1, 2, 1, 8, false, false>)         \
  KERNEL("decode_packed" #BITS "_gated_f32_0", decode_packed<float, BITS, 1, 2, 1, 8, true, false>)    \
  KERNEL("decode_packed" #BITS "_attended_f32_0", decode_packed_attended<float, BITS, 1, 4, 4, false>) \
  KERNEL("decode_packed" #BITS "_embed", decode_packed_embed<BITS>)
