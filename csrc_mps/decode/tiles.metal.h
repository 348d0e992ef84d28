// Products of a matrix's rows with several vectors on the matrix units, for any format, with what the other products
// fuse: a norm before, bias, residual and activation after.
#pragma once
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

// What a lane holds of the norm's weights: those of its vectors' runs.
template <typename T>
struct TileNorms {
  Pack<T, N> runs[2];
};

template <typename T>
inline void load_norms(thread TileNorms<T>& norms, device const T* norm, thread const uint* runs, uint column,
                       uint cols) {
#pragma unroll
  for (int i = 0; i < 2; i++) load_pack<T, true>(norm, column + runs[i], cols, norms.runs[i]);
}

// `rows` loads tiles of type Tile; T is the type of norms and biases. GATED: a tile has eight rows of a gate and the
// same of an up, and the result is activation(gate) * up.
template <typename T, bool GATED, typename Tile, typename TileRows>
inline void multiply_tiles(thread TileRows& rows, device const ushort* b0, device const ushort* b1,
                           device const ushort* b2, device const float* vectors, device const ushort* norm,
                           device float* results, constant ProductParams& p, threadgroup SharedTiles& shared,
                           uint group, uint lane, uint simdgroup, uint simdgroups) {
  constexpr int OUTPUTS = GATED ? 1 : 2;  // rows of a lane's results
  TileLane lanes;
  tile_lane(lane, lanes);
  const uint blocks = (p.vectors + kTileVectors - 1) / kTileVectors, slots = simdgroups / p.splits;
  const uint first_vector = group % blocks * kTileVectors, split = simdgroup % p.splits;
  const uint first = (group / blocks * slots + simdgroup / p.splits) * 8 * OUTPUTS + lanes.row;
  const uint last = p.ends[GATED ? 0 : 2] - 1;

  uint indices[2], matrices[2];  // of the lane's rows
#pragma unroll
  for (uint i = 0; i < 2; i++) {
    const uint index = min(GATED ? first : first + 8 * i, last);
    const uint of = GATED ? i : uint(index >= p.ends[0]) + uint(index >= p.ends[1]);
    indices[i] = GATED || of == 0 ? index : index - p.ends[of - 1];
    matrices[i] = of;
    rows.point(i, of, indices[i]);
  }
  device const float* sources[2];
  uint runs[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    sources[i] = vectors + vector_offset(p, first_vector + lanes.vectors[i]);
    runs[i] = run_column(lanes.vector_pairs[i], lanes.vector_halves[i]);
  }
  const bool normed = p.flags & kNormed;
  const uint step = p.splits * kTileColumns;
  uint column = split * kTileColumns;
  Tile tile;
  TileNorms<T> norms;
  load_tile(rows, lanes.pair, column, p.cols, tile);
  if (normed) load_norms(norms, (device const T*)norm, runs, column, p.cols);
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

  Pack<float, N> packs[2];
#pragma unroll
  for (int i = 0; i < 2; i++) load_pack<float, true>(sources[i], column + runs[i], p.cols, packs[i]);
  // Several parts of each sum, so that a product need not wait for the one before.
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f}, parts[CHAINS][4] = {}, squares[2] = {0.0f, 0.0f};
  while (true) {
    const uint next_column = column + step;
    Tile next;  // under way while this one is multiplied
    TileNorms<T> next_norms;
    load_tile(rows, lanes.pair, next_column, p.cols, next);
    if (normed) load_norms(next_norms, (device const T*)norm, runs, next_column, p.cols);
    float x[2][N];
    Pack<float, N> next_packs[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      load_pack<float, true>(sources[i], next_column + runs[i], p.cols, next_packs[i]);
      packs[i].unpack(x[i]);
#pragma unroll
      for (int j = 0; normed && j < N; j++) {
        squares[i] = fma(x[i][j], x[i][j], squares[i]);
        x[i][j] *= norms.runs[i].get(j) + p.norm_offset;
      }
    }
#pragma unroll
    for (int j = 0; j < N; j++) {
      float w[4];
      tile_weights(rows, tile, j, w);
      const float columns[2] = {x[0][j], x[1][j]};
      multiply_tile(parts[j % CHAINS], w, columns);
    }
    end_tile(rows, tile, x[0], x[1], lane, parts[0], parts[1], sums);
    column = next_column;
    if (column >= p.cols) break;
    copy_tile(tile, next);
#pragma unroll
    for (int i = 0; i < 2 * N; i++) packs[i / N].words[i % N] = next_packs[i / N].words[i % N];
#pragma unroll
    for (int i = 0; i < 8; i++) norms.runs[i / 4].words[i % 4] = next_norms.runs[i / 4].words[i % 4];
  }
#pragma unroll
  for (int i = 0; i < 4 * CHAINS; i++) sums[i % 4] += parts[i / 4][i % 4];

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
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (!writes[GATED ? 0 : i][v] || isfinite(sums[2 * i + v])) continue;
      multiply_again(rows, i, vectors + vector_offset(p, first_vector + lanes.result + v), norm, p, sums[2 * i + v]);
    }
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
