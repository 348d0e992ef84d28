// Products of matrix rows with a few vectors, a simdgroup or several a row. What comes before a product (a norm, the
// chunks of attention put together) and after it (bias, residual, activation) is part of the same launch.
//
// A lane takes eight columns of every block of 256. It holds them of the rows and of a vector in registers, so no lane
// waits for another before the sums at the end, and all rows are under way before the first vector is needed.
#include <metal_stdlib>
#include "common/pack.metal.h"
#include "decode/decode_params.h"
#include "decode/vectors.metal.h"
using namespace metal;
using namespace torch_fused;

constant constexpr int W = kLaneColumns;

// Eight columns of attention's result: each chunk has its weighted values, and of the scores the maximum (in octaves)
// and the sum.
template <bool WHOLE>
inline void combine_chunks(device const float* values, device const float2* stats, uint column,
                           constant ProductParams& p, thread float* x) {
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

// Eight columns of vector `source`.
template <bool COMBINE, bool WHOLE>
inline void load_vector(device const float* vectors, device const float2* stats, uint source, uint column,
                        constant ProductParams& p, thread float* x) {
  if (!COMBINE) {
    Pack<float, W> pack;
    load_pack<float, WHOLE>(vectors + ulong(source) * p.cols, column, p.cols, pack);
    pack.unpack(x);
    return;
  }
  device const float* values = vectors + ulong(source) * p.chunks * p.cols;
  device const float2* stat = stats + ulong(source) * (p.cols / p.head_dim) * p.chunks;
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
}

inline float silu(float x) { return x / (1.0f + exp(-x)); }

// R rows at once with C vectors, U blocks of columns at once. GATED: the rows are pairs of a gate's and an up's, and the
// result is silu(gate) * up. COMBINE: the vectors are attention's, in chunks.
template <typename T, int C, int R, int U, bool GATED, bool COMBINE, bool WHOLE>
[[kernel, max_total_threads_per_threadgroup(256)]]
void decode_product(device const T* w0 [[buffer(0)]], device const T* w1 [[buffer(1)]],
                    device const T* w2 [[buffer(2)]], device const ushort* b0 [[buffer(3)]],
                    device const ushort* b1 [[buffer(4)]], device const ushort* b2 [[buffer(5)]],
                    device const float* vectors [[buffer(6)]], device const float2* stats [[buffer(7)]],
                    device const ushort* norm [[buffer(8)]], device float* results [[buffer(9)]],
                    constant ProductParams& p [[buffer(10)]], uint group [[threadgroup_position_in_grid]],
                    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                    uint simdgroups [[simdgroups_per_threadgroup]]) {
  constexpr int OUTPUTS = GATED ? R / 2 : R;
  constexpr int SUMS = (R + 1) * C;  // of the rows, and of the vectors' squares
  threadgroup float scratch[8 * SUMS];
  const uint blocks = (p.vectors + C - 1) / C, slots = simdgroups / p.splits;
  const uint first_vector = group % blocks * C, split = simdgroup % p.splits;
  const uint first = (group / blocks * slots + simdgroup / p.splits) * OUTPUTS;
  const uint last = p.ends[GATED ? 0 : 2] - 1;

  device const T* rows[R];
#pragma unroll
  for (int r = 0; r < R; r++) {
    const uint index = min(first + (GATED ? r / 2 : r), last);
    const uint of = GATED ? r % 2 : uint(index >= p.ends[0]) + uint(index >= p.ends[1]);
    const uint row_of = GATED || of == 0 ? index : index - p.ends[of - 1];
    rows[r] = (of == 0 ? w0 : of == 1 ? w1 : w2) + long(row_of) * p.strides[of];
  }
  uint sources[C];
#pragma unroll
  for (int c = 0; c < C; c++) {
    const uint vector = min(first_vector + c, p.vectors - 1);
    sources[c] = vector / p.kept * p.steps + p.steps - p.kept + vector % p.kept;
  }

  // The first rows are under way before the vectors are there.
  const uint stride = p.splits * U * kBlockColumns;
  uint begin = split * U * kBlockColumns;
  Pack<T, W> packs[R][U];
#pragma unroll
  for (int u = 0; u < U; u++) {
#pragma unroll
    for (int r = 0; r < R; r++) {
      load_pack<T, WHOLE>(rows[r], begin + lane * W + u * kBlockColumns, p.cols, packs[r][u]);
    }
  }
  previous_launch_done(lane);

  // The result that this lane will write, and what is added to it.
  const uint row = min(first + lane / C, last), vector = first_vector + lane % C;
  const bool writes = split == 0 && lane < uint(OUTPUTS * C) && first + lane / C <= last && vector < p.vectors;
  device float* result = results + ulong(vector) * p.result_stride + row;
  const float residual = writes && p.flags & kAdd ? *result : 0.0f;
  const uint matrix = uint(row >= p.ends[0]) + uint(row >= p.ends[1]);
  float bias = 0.0f;
  if (!GATED && writes && p.flags & (kBias << matrix)) {
    bias = vector_at<T, WHOLE>(matrix == 0 ? b0 : matrix == 1 ? b1 : b2, p.bias_format,
                               matrix == 0 ? row : row - p.ends[matrix - 1]);
  }

  float sums[R + 1][C];
#pragma unroll
  for (int r = 0; r <= R; r++) {
#pragma unroll
    for (int c = 0; c < C; c++) sums[r][c] = 0.0f;
  }
  const bool normed = p.flags & kNormed;
  while (begin < p.cols) {
#pragma unroll
    for (int u = 0; u < U; u++) {
      const uint place = begin + lane * W + u * kBlockColumns;
      float weight[W];
      if (normed && WHOLE) {
        Pack<T, W> pack;
        load_pack<T, true>((device const T*)norm, place, p.cols, pack);
        pack.unpack(weight);
      }
      if (normed && !WHOLE) {
        for (int j = 0; j < W; j++) {
          weight[j] = place + j < p.cols ? vector_at<T, false>(norm, p.norm_format, place + j) : 0.0f;
        }
      }
#pragma unroll
      for (int c = 0; c < C; c++) {
        float x[W];
        load_vector<COMBINE, WHOLE>(vectors, stats, sources[c], place, p, x);
        if (normed) {
#pragma unroll
          for (int j = 0; j < W; j++) {
            sums[R][c] = fma(x[j], x[j], sums[R][c]);
            x[j] *= weight[j];
          }
        }
#pragma unroll
        for (int r = 0; r < R; r++) {
#pragma unroll
          for (int j = 0; j < W; j++) sums[r][c] = fma(packs[r][u].get(j), x[j], sums[r][c]);
        }
      }
    }
    begin += stride;
    if (begin >= p.cols) break;
#pragma unroll
    for (int u = 0; u < U; u++) {
#pragma unroll
      for (int r = 0; r < R; r++) {
        load_pack<T, WHOLE>(rows[r], begin + lane * W + u * kBlockColumns, p.cols, packs[r][u]);
      }
    }
  }

#pragma unroll
  for (int r = 0; r <= R; r++) {
#pragma unroll
    for (int c = 0; c < C; c++) sums[r][c] = simd_sum(sums[r][c]);
  }
  if (p.splits > 1) {
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < SUMS; i++) scratch[simdgroup * SUMS + i] = sums[i / C][i % C];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint s = 1; s < p.splits && split == 0; s++) {
#pragma unroll
      for (int i = 0; i < SUMS; i++) sums[i / C][i % C] += scratch[(simdgroup + s) * SUMS + i];
    }
  }

  // Each result is a lane's.
  float sum = 0.0f, up = 0.0f, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < OUTPUTS * C; i++) {
    const bool mine = lane == uint(i);
    sum = mine ? sums[GATED ? i / C * 2 : i / C][i % C] : sum;
    up = mine ? sums[GATED ? i / C * 2 + 1 : 0][i % C] : up;
    squares = mine ? sums[R][i % C] : squares;
  }
  if (!writes) return;
  const float scale = normed ? rsqrt(squares / float(p.cols) + p.eps) : 1.0f;
  *result = residual + (GATED ? silu(sum * scale) * (up * scale) : sum * scale + bias);
}

// A row of the embedding a token; a token that is not in it has NaN.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(256)]]
void decode_embed(device const T* embedding [[buffer(0)]], device const long* token_ids [[buffer(1)]],
                  device float* states [[buffer(2)]], constant EmbedParams& p [[buffer(3)]],
                  uint token [[threadgroup_position_in_grid]], uint thread_id [[thread_position_in_threadgroup]],
                  uint threads [[threads_per_threadgroup]]) {
  const long id = token_ids[token];
  const bool known = id >= 0 && id < long(p.vocabulary);
  for (uint i = thread_id; i < p.hidden; i += threads) {
    states[ulong(token) * p.hidden + i] = known ? float(embedding[id * p.stride + i]) : NAN;
  }
}

#define PRODUCT(host, T, C, R, U, GATED, COMBINE, WHOLE)                                                             \
  template [[host_name(host)]] [[kernel]] void decode_product<T, C, R, U, GATED, COMBINE, WHOLE>(                    \
      device const T*, device const T*, device const T*, device const ushort*, device const ushort*,                 \
      device const ushort*, device const float*, device const float2*, device const ushort*, device float*,          \
      constant ProductParams&, uint, uint, uint, uint);
#define DECODE(name, T)                                                          \
  PRODUCT("decode_product_" #name "_1", T, 1, 2, 4, false, false, true)          \
  PRODUCT("decode_product_" #name "_8", T, 8, 4, 1, false, false, true)          \
  PRODUCT("decode_product_" #name "_0", T, 1, 2, 1, false, false, false)         \
  PRODUCT("decode_gated_" #name "_1", T, 1, 2, 4, true, false, true)             \
  PRODUCT("decode_gated_" #name "_8", T, 8, 4, 1, true, false, true)             \
  PRODUCT("decode_gated_" #name "_0", T, 1, 2, 1, true, false, false)            \
  PRODUCT("decode_attended_" #name "_1", T, 1, 2, 2, false, true, true)          \
  PRODUCT("decode_attended_" #name "_0", T, 1, 2, 1, false, true, false)         \
  template [[host_name("decode_embed_" #name)]] [[kernel]] void decode_embed<T>( \
      device const T*, device const long*, device float*, constant EmbedParams&, uint, uint, uint);
DECODE(f32, float)
DECODE(f16, half)
DECODE(bf16, bfloat)
