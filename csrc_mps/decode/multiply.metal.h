// Products of a matrix's rows with a few vectors, with one or more simdgroups per row, for any format. A norm before a
// product, and operations after it (bias, residual, activation), are fused.
//
// A lane handles N columns of every block of 32 N. It holds those of the rows and of a vector in registers, so no lane
// waits for another before the sums at the end, and all rows are being loaded before the first vector is needed.
#pragma once
#include <metal_stdlib>
#include "common/activation.metal.h"
#include "common/pack.metal.h"
#include "decode/decode_params.h"
#include "decode/product.metal.h"
#include "decode/rows.metal.h"
#include "decode/vectors.metal.h"
using namespace metal;
using namespace torch_fused;

// Where a vector of the step begins.
inline ulong vector_offset(constant ProductParams& p, uint vector) {
  const uint v = min(vector, p.vectors - 1);
  if (p.kept == p.steps) return ulong(v) * p.cols;
  return ulong(v / p.kept * p.steps + p.steps - p.kept + v % p.kept) * p.cols;
}

// The norm's weights for U blocks of columns.
template <bool WHOLE, typename T, int U, int N>
inline void load_norm(device const ushort* norm, uint column, uint cols, thread Pack<T, N> (&packs)[U]) {
#pragma unroll
  for (int u = 0; u < U; u++) load_pack<T, WHOLE>((device const T*)norm, column + u * 32 * N, cols, packs[u]);
}

// A vector's columns as a row is multiplied with them: times the norm's weights, if there is a norm.
template <typename T, int N, bool WHOLE>
inline void load_vector(device const float* source, device const ushort* norm, uint column, constant ProductParams& p,
                        thread float* x) {
  Pack<float, N> pack;
  load_pack<float, WHOLE>(source, column, p.cols, pack);
  pack.unpack(x);
  for (int j = 0; p.flags & kNormed && j < N; j++) {
    x[j] *= column + j < p.cols ? vector_at<T, WHOLE>(norm, p.norm_format, column + j) + p.norm_offset : 0.0f;
  }
}

// The sum of squares of each of C vectors, one simdgroup per vector.
template <int C, bool WHOLE>
inline void sum_squares(device const float* vectors, constant ProductParams& p, uint first_vector, uint lane,
                        uint simdgroup, uint simdgroups, threadgroup float* squares) {
  for (uint c = simdgroup; c < C; c += simdgroups) {
    device const float* from = vectors + vector_offset(p, first_vector + c);
    float sum = 0.0f;
    for (uint column = lane * kLaneColumns; column < p.cols; column += kBlockColumns) {
      Pack<float, kLaneColumns> x;
      load_pack<float, WHOLE>(from, column, p.cols, x);
#pragma unroll
      for (uint j = 0; j < kLaneColumns; j++) sum = fma(x.get(j), x.get(j), sum);
    }
    sum = simd_sum(sum);
    if (lane == 0) squares[c] = sum;
  }
}

// After the products with one vector: dense rows need nothing.
template <bool WHOLE, typename T, int R, int U>
inline void multiply_again(thread Rows<T, R, U>&, device const float*, device const ushort*, uint, uint,
                           constant ProductParams&, thread float (&)[R]) {}

// Shared by the simdgroups of a threadgroup, for up to C vectors.
template <int C>
struct Shared {
  float2 sums[kMostSplitSimdgroups * 32];
  float squares[C];
};

// R rows at once with C vectors, U blocks of columns at once. `rows` loads rows, N columns per lane; T is the type
// of norms and biases. GATED: the rows are pairs of a gate's and an up's, and the result is activation(gate) * up.
template <typename T, int C, int R, int U, int N, bool GATED, bool WHOLE, typename MatrixRows>
inline void multiply(thread MatrixRows& rows, device const ushort* b0, device const ushort* b1, device const ushort* b2,
                     device const float* vectors, device const ushort* norm, device float* results,
                     constant ProductParams& p, threadgroup Shared<C>& shared, uint group, uint lane, uint simdgroup,
                     uint simdgroups) {
  constexpr int OUTPUTS = GATED ? R / 2 : R;
  constexpr bool MANY = C > 1;  // then a norm's weights go to the rows, and the squares are summed once a threadgroup
  const uint blocks = (p.vectors + C - 1) / C, slots = simdgroups / p.splits;
  const uint first_vector = group % blocks * C, split = simdgroup % p.splits;
  const uint first = (group / blocks * slots + simdgroup / p.splits) * OUTPUTS;
  const uint last = p.ends[GATED ? 0 : 2] - 1;

#pragma unroll
  for (int r = 0; r < R; r++) {
    const uint index = min(first + (GATED ? r / 2 : r), last);
    const uint of = GATED ? r % 2 : uint(index >= p.ends[0]) + uint(index >= p.ends[1]);
    rows.point(r, of, GATED || of == 0 ? index : index - p.ends[of - 1]);
  }
  device const float* sources[C];
#pragma unroll
  for (int c = 0; c < C; c++) sources[c] = vectors + vector_offset(p, first_vector + c);
  // The result that this lane will write.
  const uint row = min(first + lane / C, last), vector = first_vector + lane % C;
  const bool writes = split == 0 && lane < uint(OUTPUTS * C) && first + lane / C <= last && vector < p.vectors;
  device float* result = results + ulong(vector) * p.result_stride + row;
  const uint matrix = uint(row >= p.ends[0]) + uint(row >= p.ends[1]);
  float bias = 0.0f;
  if (!GATED && writes && p.flags & (kBias << matrix)) {
    bias = vector_at<T, WHOLE>(matrix == 0   ? b0
                               : matrix == 1 ? b1
                                             : b2,
                               p.bias_format, matrix == 0 ? row : row - p.ends[matrix - 1]);
  }

  // The first rows are loaded before the vectors are ready.
  const bool normed = p.flags & kNormed;
  const uint step = p.splits * U * 32 * N;
  uint column = split * U * 32 * N + lane * N;
  Pack<T, N> norms[U];
  load_rows<WHOLE>(rows, column, p.cols);
  if (normed && WHOLE) load_norm<WHOLE>(norm, column, p.cols, norms);
  previous_launch_done(lane);
  const float residual = writes && p.flags & kAdd ? *result : 0.0f;
  if (MANY && normed) {
    sum_squares<C, WHOLE>(vectors, p, first_vector, lane, simdgroup, simdgroups, shared.squares);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  float sums[C][R], squares[C];
#pragma unroll
  for (int i = 0; i < R * C; i++) sums[i / R][i % R] = 0.0f;
#pragma unroll
  for (int c = 0; c < C; c++) squares[c] = 0.0f;
  while (true) {
#pragma unroll
    for (int u = 0; u < U; u++) {
      const uint place = column + u * 32 * N;
      float weight[N];
      if (normed && WHOLE) {
        norms[u].unpack(weight);
        if (p.norm_offset != 0.0f) {
#pragma unroll
          for (int j = 0; j < N; j++) weight[j] += p.norm_offset;
        }
      }
      if (normed && !WHOLE) {
        for (int j = 0; j < N; j++) {
          weight[j] = place + j < p.cols ? vector_at<T, false>(norm, p.norm_format, place + j) + p.norm_offset : 0.0f;
        }
      }
      float w[R][N];
#pragma unroll
      for (int r = 0; MANY && r < R; r++) {
#pragma unroll
        for (int j = 0; j < N; j++) w[r][j] = rows.packs[r][u].get(j);
        if (normed) {
#pragma unroll
          for (int j = 0; j < N; j++) w[r][j] *= weight[j];
        }
      }
#pragma unroll
      for (int c = 0; c < C; c++) {
        Pack<float, N> pack;
        float x[N];
        load_pack<float, WHOLE>(sources[c], place, p.cols, pack);
        pack.unpack(x);
        if (!MANY && normed) {
#pragma unroll
          for (int j = 0; j < N; j++) {
            squares[c] = fma(x[j], x[j], squares[c]);
            x[j] *= weight[j];
          }
        }
        if (!MANY) add_products(rows, u, x, sums[c]);
#pragma unroll
        for (int r = 0; MANY && r < R; r++) {
#pragma unroll
          for (int j = 0; j < N; j++) sums[c][r] = fma(w[r][j], x[j], sums[c][r]);
        }
      }
    }
    column += step;
    if (column - lane * N >= p.cols) break;
    load_rows<WHOLE>(rows, column, p.cols);
    if (normed && WHOLE) load_norm<WHOLE>(norm, column, p.cols, norms);
  }

  if (!MANY) {
    multiply_again<WHOLE>(rows, sources[0], norm, split * U * 32 * N + lane * N, step, p, sums[0]);
  }

  // Each result is a lane's: the vectors of a row, then those of the next; a gate's rows come before an up's.
  float ordered[R * C];
#pragma unroll
  for (int i = 0; i < R * C; i++) {
    const int r = i / C;
    ordered[i] = sums[i % C][GATED ? r % OUTPUTS * 2 + r / OUTPUTS : r];
  }
  float2 sum = float2(sum_of_each<R * C>(ordered, lane), MANY ? 0.0f : sum_of_each<C>(squares, lane));
  if (p.splits > 1) {
    shared.sums[simdgroup * 32 + lane] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint s = 1; s < p.splits && split == 0; s++) sum += shared.sums[(simdgroup + s) * 32 + lane];
  }
  const float up = simd_shuffle_xor(sum.x, ushort(OUTPUTS * C % 32));
  if (!writes) return;
  if (MANY && normed) sum.y = shared.squares[lane % C];
  const float scale = normed ? rsqrt(sum.y / float(p.cols) + p.eps) : 1.0f;
  const float value = GATED ? activate(sum.x * scale, p.activation) * (up * scale) : sum.x * scale + bias;
  *result = fma(value, p.scale, residual);
}
