// Products of a 16-bit matrix's rows with several vectors on the matrix units, with what the other products fuse: a norm
// before, bias, residual and activation after.
#include <metal_stdlib>
#include "common/kernel.metal.h"
#include "decode/multiply.metal.h"
#include "decode/tile.metal.h"
using namespace metal;
using namespace torch_fused;

constant constexpr int N = kLaneColumns;

// Shared by the simdgroups of a threadgroup that split rows.
struct SharedTiles {
  float4 sums[kMostSplitSimdgroups * 32];
  float2 squares[kMostSplitSimdgroups * 32];
};

// What a lane holds of U tiles of a matrix: two rows, two runs of each.
template <typename T, int U>
struct TileRows {
  device const T* at[2];
  Pack<T, N> packs[U][2][2];

  void load(uint column, uint cols) {
#pragma unroll
    for (int u = 0; u < U; u++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        load_pack<T, true>(at[i / 2], column + u * kTileColumns + run_column(0, i % 2), cols, packs[u][i / 2][i % 2]);
      }
    }
  }
};

// GATED: a tile has eight rows of a gate and the same of an up, and the result is activation(gate) * up.
template <typename T, int U, bool GATED>
[[kernel, max_total_threads_per_threadgroup(256)]]
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
  TileLane tile;
  tile_lane(lane, tile);
  const uint blocks = (p.vectors + kTileVectors - 1) / kTileVectors, slots = simdgroups / p.splits;
  const uint first_vector = group % blocks * kTileVectors, split = simdgroup % p.splits;
  const uint first = (group / blocks * slots + simdgroup / p.splits) * 8 * OUTPUTS + tile.row;
  const uint last = p.ends[GATED ? 0 : 2] - 1;

  TileRows<T, U> rows;
  uint indices[2];  // of the lane's rows in their matrices
  uint matrices[2];
#pragma unroll
  for (uint i = 0; i < 2; i++) {
    const uint index = min(GATED ? first : first + 8 * i, last);
    const uint of = GATED ? i : uint(index >= p.ends[0]) + uint(index >= p.ends[1]);
    indices[i] = GATED || of == 0 ? index : index - p.ends[of - 1];
    matrices[i] = of;
    rows.at[i] = (of == 0 ? w0 : of == 1 ? w1 : w2) + long(indices[i]) * p.strides[of];
  }
  const uint step = p.splits * U * kTileColumns;
  uint column = split * U * kTileColumns;
  rows.load(column + run_column(tile.pair, 0), p.cols);
  const bool normed = p.flags & kNormed;
  device const float* sources[2];
  uint places[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    sources[i] = vectors + vector_offset(p, first_vector + tile.vectors[i]);
    places[i] = run_column(tile.vector_pairs[i], tile.vector_halves[i]);
  }
  float biases[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < OUTPUTS; i++) {
    if (!GATED && p.flags & (kBias << matrices[i])) {
      biases[i] = float(((device const T*)(matrices[i] == 0 ? b0 : matrices[i] == 1 ? b1 : b2))[indices[i]]);
    }
  }
  previous_launch_done(lane);

  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f}, squares[2] = {0.0f, 0.0f};
  while (true) {
#pragma unroll
    for (int u = 0; u < U; u++) {
      float x[2][N];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint place = column + u * kTileColumns + places[i];
        Pack<float, N> pack;
        load_pack<float, true>(sources[i], place, p.cols, pack);
        pack.unpack(x[i]);
        if (!normed) continue;
        Pack<T, N> weights;
        load_pack<T, true>((device const T*)norm, place, p.cols, weights);
#pragma unroll
        for (int j = 0; j < N; j++) {
          squares[i] = fma(x[i][j], x[i][j], squares[i]);
          x[i][j] *= weights.get(j) + p.norm_offset;
        }
      }
#pragma unroll
      for (int j = 0; j < N; j++) {
        const float w[4] = {rows.packs[u][0][0].get(j), rows.packs[u][0][1].get(j), rows.packs[u][1][0].get(j),
                            rows.packs[u][1][1].get(j)};
        const float columns[2] = {x[0][j], x[1][j]};
        multiply_tile(sums, w, columns);
      }
    }
    column += step;
    if (column >= p.cols) break;
    rows.load(column + run_column(tile.pair, 0), p.cols);
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
    const uint vector = first_vector + tile.result + v;
    const float scale = normed ? rsqrt(squares[v] / float(p.cols) + p.eps) : 1.0f;
#pragma unroll
    for (int i = 0; i < OUTPUTS; i++) {
      const uint row = first + 8 * i;
      if (vector >= p.vectors || row > last) continue;
      const float sum = sums[2 * i + v] * scale;
      const float value = GATED ? activate(sum, p.activation) * (sums[2 + v] * scale) : sum + biases[i];
      device float* result = results + ulong(vector) * p.result_stride + row;
      *result = fma(value, p.scale, p.flags & kAdd ? *result : 0.0f);
    }
  }
}

#define TILES(name, T)                                         \
  KERNEL("decode_tiles_" #name, decode_tiles<T, 2, false>)     \
  KERNEL("decode_tiles_gated_" #name, decode_tiles<T, 2, true>)
TILES(f16, half)
TILES(bf16, bfloat)
