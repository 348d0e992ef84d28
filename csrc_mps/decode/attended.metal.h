// The product after attention, for dense and packed rows. A threadgroup combines the chunks of the context,
// some columns at a time, and multiplies its rows by the result.
#pragma once
#include <metal_stdlib>
#include "common/pack.metal.h"
#include "decode/decode_params.h"
#include "decode/product.metal.h"
#include "decode/rows.metal.h"
#include "decode/vectors.metal.h"
using namespace metal;
using namespace torch_fused;

constant constexpr int W = kLaneColumns, THREADS = 32 * kProductSimdgroups;

// Eight columns of attention's result: each chunk has its weighted values, and of the scores the maximum (in octaves)
// and the sum.
template <bool WHOLE>
inline void combine_chunks(device const float* values, device const float2* stats, uint column,
                           constant AttendedParams& p, thread float* x) {
  const uint head = column / p.head_dim, place = column % p.head_dim;
  device const float2* stat = stats + ulong(head) * p.chunks;
  device const float* from = values + ulong(head) * p.chunks * p.head_dim + place;
  float largest = stat[0].x;
  for (uint c = 1; c < p.chunks; c++) largest = max(largest, stat[c].x);
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < W; j++) x[j] = 0.0f;
#pragma unroll 4
  for (uint c = 0; c < p.chunks; c++) {
    const float weight = exp2(stat[c].x - largest);
    Pack<float, W> chunk;
    load_pack<float, WHOLE>(from + c * p.head_dim, 0, p.head_dim - place, chunk);
    sum = fma(stat[c].y, weight, sum);
#pragma unroll
    for (int j = 0; j < W; j++) x[j] = fma(chunk.get(j), weight, x[j]);
  }
  const float scale = 1.0f / sum;
#pragma unroll
  for (int j = 0; j < W; j++) x[j] *= scale;
}

// U blocks of the columns of C vectors.
template <int C, int U>
struct Combined {
  float4 columns[C * U * kBlockColumns / 4];
};

// R rows of a simdgroup at once with C vectors, U blocks of columns at once; T is the type of biases.
template <typename T, int C, int R, int U, bool WHOLE, typename MatrixRows>
inline void multiply_attended(thread MatrixRows& rows, device const ushort* bias, device const float* chunks,
                              device const float2* stats, device float* results, constant AttendedParams& p,
                              threadgroup Combined<C, U>& combined, uint group, uint thread_id, uint lane,
                              uint simdgroup) {
  constexpr int PLACES = U * kBlockColumns / W;  // of eight columns
  static_assert(C * PLACES % THREADS == 0, "every thread fills as many places");
  const uint blocks = (p.vectors + C - 1) / C, first_vector = group % blocks * C;
  const uint first = (group / blocks * kProductSimdgroups + simdgroup) * R, last = p.rows - 1;
#pragma unroll
  for (int r = 0; r < R; r++) rows.point(r, 0, min(first + r, last));
  const uint row = first + lane / C, vector = first_vector + lane % C;
  const bool writes = lane < uint(R * C) && row <= last && vector < p.vectors;
  device float* result = results + ulong(vector) * p.rows + row;
  const float shift = writes && p.flags & kBias ? vector_at<T, WHOLE>(bias, p.bias_format, row) : 0.0f;
  load_rows<WHOLE>(rows, lane * W, p.cols);
  previous_launch_done(lane);
  const float residual = writes && p.flags & kAdd ? *result : 0.0f;

  float sums[R * C];
#pragma unroll
  for (int i = 0; i < R * C; i++) sums[i] = 0.0f;
  for (uint begin = 0; begin < p.cols; begin += U * kBlockColumns) {
    if (begin > 0) load_rows<WHOLE>(rows, begin + lane * W, p.cols);
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the columns before are done with
#pragma unroll
    for (int k = 0; k < C * PLACES / THREADS; k++) {
      const uint place = thread_id + k * THREADS, column = begin + place % PLACES * W;
      const uint source = min(first_vector + place / PLACES, p.vectors - 1);
      device const float* values = chunks + ulong(source) * p.chunks * p.cols;
      device const float2* stat = stats + ulong(source) * (p.cols / p.head_dim) * p.chunks;
      float x[W];
#pragma unroll
      for (int j = 0; j < W; j++) x[j] = 0.0f;
      if (WHOLE) {
        if (column < p.cols) combine_chunks<true>(values, stat, column, p, x);
      } else {
        for (uint j = 0; j < W && column + j < p.cols; j++) {  // they may lie in several heads
          float one[W];
          combine_chunks<false>(values, stat, column + j, p, one);
          x[j] = one[0];
        }
      }
      combined.columns[place * 2] = float4(x[0], x[1], x[2], x[3]);
      combined.columns[place * 2 + 1] = float4(x[4], x[5], x[6], x[7]);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (int c = 0; c < C; c++) {
#pragma unroll
      for (int u = 0; u < U; u++) {
        const uint place = c * PLACES + u * 32 + lane;
        const float4 low = combined.columns[place * 2], high = combined.columns[place * 2 + 1];
        const float y[W] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int r = 0; r < R; r++) {
#pragma unroll
          for (int j = 0; j < W; j++) sums[r * C + c] = fma(rows.packs[r][u].get(j), y[j], sums[r * C + c]);
        }
      }
    }
  }
  const float sum = sum_of_each<R * C>(sums, lane);
  if (writes) *result = fma(sum + shift, p.scale, residual);
}
