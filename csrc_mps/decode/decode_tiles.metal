// Products of a 16-bit matrix's rows with several vectors on the matrix units, with what the other products fuse: a norm
// before, bias, residual and activation after.
#include <metal_stdlib>
#include "common/kernel.metal.h"
#include "decode/multiply.metal.h"
#include "decode/tile.metal.h"
using namespace metal;
using namespace torch_fused;

constant constexpr int N = kLaneColumns, CHAINS = 2;

// Shared by the simdgroups of a threadgroup that split rows.
struct SharedTiles {
  float4 sums[kMostTileSimdgroups * 32];
  float2 squares[kMostTileSimdgroups * 32];
};

// What a lane holds of a tile: two runs of two rows, and the norm's weights of its vectors' runs.
template <typename T>
struct Tile {
  Pack<T, N> rows[2][2], norms[2];
};

// Where its parts begin.
template <typename T>
struct TilePlaces {
  device const T* rows[2];
  device const T* norm;
  bool normed;
  uint pair, runs[2];
};

template <typename T>
inline void load_tile(thread Tile<T>& tile, thread const TilePlaces<T>& from, uint column, uint cols) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    load_pack<T, true>(from.rows[i / 2], column + run_column(from.pair, i % 2), cols, tile.rows[i / 2][i % 2]);
  }
#pragma unroll
  for (int i = 0; from.normed && i < 2; i++) load_pack<T, true>(from.norm, column + from.runs[i], cols, tile.norms[i]);
}

template <typename T>
inline void copy_tile(thread Tile<T>& to, thread const Tile<T>& from) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
#pragma unroll
    for (int word = 0; word < 4; word++) {
      to.rows[i / 2][i % 2].words[word] = from.rows[i / 2][i % 2].words[word];
      if (i < 2) to.norms[i].words[word] = from.norms[i].words[word];
    }
  }
}

// GATED: a tile has eight rows of a gate and the same of an up, and the result is activation(gate) * up.
template <typename T, bool GATED>
[[kernel, max_total_threads_per_threadgroup(512)]]
void decode_tiles(device const T* w0 [[buffer(0)]], device const T* w1 [[buffer(1)]],
                  device const T* w2 [[buffer(2)]], device const ushort* b0 [[buffer(3)]],
                  device const ushort* b1 [[buffer(4)]], device const ushort* b2 [[buffer(5)]],
                  device const float* vectors [[buffer(6)]], device const ushort* norm [[buffer(7)]],
                  device float* results [[buffer(8)]], constant ProductParams& p [[buffer(9)]],
                  uint group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
                  uint simdgroup [[simdgroup_index_in_threadgroup]],
                  uint simdgroups [[simdgroups_per_threadgroup]]) {
  constexpr int OUTPUTS = GATED ? 1 : 2;  // rows of a lane's results
  threadgroup SharedTiles shared;
  TileLane lanes;
  tile_lane(lane, lanes);
  const uint blocks = (p.vectors + kTileVectors - 1) / kTileVectors, slots = simdgroups / p.splits;
  const uint first_vector = group % blocks * kTileVectors, split = simdgroup % p.splits;
  const uint first = (group / blocks * slots + simdgroup / p.splits) * 8 * OUTPUTS + lanes.row;
  const uint last = p.ends[GATED ? 0 : 2] - 1;

  TilePlaces<T> from;
  uint indices[2];  // of the lane's rows in their matrices
  uint matrices[2];
#pragma unroll
  for (uint i = 0; i < 2; i++) {
    const uint index = min(GATED ? first : first + 8 * i, last);
    const uint of = GATED ? i : uint(index >= p.ends[0]) + uint(index >= p.ends[1]);
    indices[i] = GATED || of == 0 ? index : index - p.ends[of - 1];
    matrices[i] = of;
    from.rows[i] = (of == 0 ? w0 : of == 1 ? w1 : w2) + long(indices[i]) * p.strides[of];
  }
  device const float* sources[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    sources[i] = vectors + vector_offset(p, first_vector + lanes.vectors[i]);
    from.runs[i] = run_column(lanes.vector_pairs[i], lanes.vector_halves[i]);
  }
  from.norm = (device const T*)norm;
  from.normed = p.flags & kNormed;
  from.pair = lanes.pair;
  const bool normed = from.normed;
  const uint step = p.splits * kTileColumns;
  uint column = split * kTileColumns;
  Tile<T> tile;
  load_tile(tile, from, column, p.cols);
  float biases[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < OUTPUTS; i++) {
    if (!GATED && p.flags & (kBias << matrices[i])) {
      biases[i] = float(((device const T*)(matrices[i] == 0 ? b0 : matrices[i] == 1 ? b1 : b2))[indices[i]]);
    }
  }
  device float* places[OUTPUTS][2];  // of the lane's results, of rows and vectors
  bool writes[OUTPUTS][2];
  float residuals[OUTPUTS][2];
#pragma unroll
  for (int i = 0; i < OUTPUTS * 2; i++) {
    const uint row = first + i / 2 * 8, vector = first_vector + lanes.result + i % 2;
    places[i / 2][i % 2] = results + ulong(vector) * p.result_stride + row;
    writes[i / 2][i % 2] = split == 0 && vector < p.vectors && row <= last;
  }
  previous_launch_done(lane);
#pragma unroll
  for (int i = 0; i < OUTPUTS * 2; i++) {
    residuals[i / 2][i % 2] = writes[i / 2][i % 2] && p.flags & kAdd ? *places[i / 2][i % 2] : 0.0f;
  }

  // Several sums of each result, so that a product need not wait for the one before.
  float parts[CHAINS][4] = {}, squares[2] = {0.0f, 0.0f};
  while (true) {
    const uint next_column = column + step;
    Tile<T> next;  // under way while this one is multiplied
    load_tile(next, from, next_column, p.cols);
    float x[2][N];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      Pack<float, N> pack;
      load_pack<float, true>(sources[i], column + from.runs[i], p.cols, pack);
      pack.unpack(x[i]);
#pragma unroll
      for (int j = 0; normed && j < N; j++) {
        squares[i] = fma(x[i][j], x[i][j], squares[i]);
        x[i][j] *= tile.norms[i].get(j) + p.norm_offset;
      }
    }
#pragma unroll
    for (int j = 0; j < N; j++) {
      const float w[4] = {tile.rows[0][0].get(j), tile.rows[0][1].get(j), tile.rows[1][0].get(j),
                          tile.rows[1][1].get(j)};
      const float columns[2] = {x[0][j], x[1][j]};
      multiply_tile(parts[j % CHAINS], w, columns);
    }
    column = next_column;
    if (column >= p.cols) break;
    copy_tile(tile, next);
  }

  float sums[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    sums[i] = parts[0][i];
#pragma unroll
    for (int chain = 1; chain < CHAINS; chain++) sums[i] += parts[chain][i];
  }
  if (p.splits > 1) {
    const uint own = simdgroup * 32 + lane;
    shared.sums[own] = float4(sums[0], sums[1], sums[2], sums[3]);
    shared.squares[own] = float2(squares[0], squares[1]);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (split > 0) return;
    for (uint s = 1; s < p.splits; s++) {
      const float4 more = shared.sums[own + 32 * s];
      sums[0] += more.x, sums[1] += more.y, sums[2] += more.z, sums[3] += more.w;
      squares[0] += shared.squares[own + 32 * s].x, squares[1] += shared.squares[own + 32 * s].y;
    }
  }
  if (normed) sum_of_runs(squares, lane);
#pragma unroll
  for (int v = 0; v < 2; v++) {
    const float scale = normed ? rsqrt(squares[v] / float(p.cols) + p.eps) : 1.0f;
#pragma unroll
    for (int i = 0; i < OUTPUTS; i++) {
      if (!writes[i][v]) continue;
      const float sum = sums[2 * i + v] * scale;
      const float value = GATED ? activate(sum, p.activation) * (sums[2 + v] * scale) : sum + biases[i];
      *places[i][v] = fma(value, p.scale, residuals[i][v]);
    }
  }
}

#define TILES(name, T)                                  \
  KERNEL("decode_tiles_" #name, decode_tiles<T, false>) \
  KERNEL("decode_tiles_gated_" #name, decode_tiles<T, true>)
TILES(f16, half)
TILES(bf16, bfloat)
