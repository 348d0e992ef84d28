// Products of a packed matrix's rows with several vectors on the matrix units.
#include <metal_stdlib>
#include "decode/tiles.metal.h"
#include "quantized/exact_product.metal.h"
#include "quantized/packed.metal.h"
using namespace metal;
using namespace torch_fused;

// What a lane holds of a tile: two runs of two rows, with the rows' scales and biases as bits. A tile is in one group.
template <int BITS>
struct PackedTile {
  uint words[2][2][BITS / 4], scales[2], biases[2];
};

template <typename T, int BITS>
struct PackedTileRows {
  device const uint *w0, *w1, *w2;
  device const ushort *s0, *s1, *s2;  // scales
  device const ushort *g0, *g1, *g2;  // biases of groups
  constant PackedFormat* format;
  PackedRow at[2];

  PackedGroups<T, true> groups() const { return packed_groups<T, true>(format->group_size, format->scale_format); }

  void point(uint i, uint of, uint row) {
    at[i] = packed_row(of == 0   ? w0
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

template <typename T, int BITS>
inline void load_tile(thread const PackedTileRows<T, BITS>& rows, uint pair, uint column, uint cols,
                      thread PackedTile<BITS>& tile) {
  const bool inside = column < cols;
#pragma unroll
  for (int r = 0; r < 2; r++) {
#pragma unroll
    for (int half_of = 0; half_of < 2; half_of++) {
      device const uint* from = rows.at[r].words + (column + run_column(pair, half_of)) * BITS / 32;
      if (BITS == 4) {
        tile.words[r][half_of][0] = inside ? from[0] : 0u;
      } else {
        const uint2 raw = inside ? *(device const uint2*)from : uint2(0u);
        tile.words[r][half_of][0] = raw.x, tile.words[r][half_of][BITS / 8] = raw.y;
      }
    }
    const uint group = rows.groups().before(column);
    tile.scales[r] = inside ? uint(rows.at[r].scales[group]) : 0u;
    tile.biases[r] = inside ? uint(rows.at[r].biases[group]) : 0u;
  }
}

template <int BITS>
inline void copy_tile(thread PackedTile<BITS>& to, thread const PackedTile<BITS>& from) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
#pragma unroll
    for (int i = 0; i < BITS / 2; i++) to.words[r][i % 2][i / 2] = from.words[r][i % 2][i / 2];
    to.scales[r] = from.scales[r], to.biases[r] = from.biases[r];
  }
}

// Column j of the lane's runs, as 1 + code / 16 or 1 + code / 256: a code is not converted, its bits become part of a
// mantissa.
template <typename T, int BITS>
inline void tile_weights(thread const PackedTileRows<T, BITS>& rows, thread const PackedTile<BITS>& tile, int j,
                         thread float* w) {
  const int by = 23 - BITS - j * BITS % 32;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint word = tile.words[i / 2][i % 2][j * BITS / 32], moved = by > 0 ? word << by : word >> -by;
    w[i] = as_type<float>((moved & ((1u << BITS) - 1u) << (23 - BITS)) | rows.format->one);
  }
}

// Adds the tile's products, given what they are for 1 + code / CODES and the vectors' values.
template <typename T, int BITS>
inline void end_tile(thread const PackedTileRows<T, BITS>&, thread const PackedTile<BITS>& tile, thread const float* x0,
                     thread const float* x1, uint lane, thread float* parts0, thread float* parts1,
                     thread float* sums) {
  constexpr float CODES = 1 << BITS;
  float of_x[2] = {0.0f, 0.0f};
#pragma unroll
  for (int j = 0; j < N; j++) of_x[0] += x0[j], of_x[1] += x1[j];
  sum_of_runs(of_x, lane);
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const float scale = CODES * value_of<T>(tile.scales[k / 2]), bias = value_of<T>(tile.biases[k / 2]);
    sums[k] = fma(scale, parts0[k] + parts1[k], fma(bias - scale, of_x[k % 2], sums[k]));
    parts0[k] = parts1[k] = 0.0f;
  }
}

template <typename T, int BITS>
inline void multiply_again(thread const PackedTileRows<T, BITS>& rows, int i, device const float* vector,
                           device const ushort* norm, constant ProductParams& p, thread float& sum) {
  sum = exact_product<BITS, T>(rows.at[i], vector, (device const T*)norm, rows.groups(), p);
}

template <typename T, int BITS, bool GATED>
[[kernel, max_total_threads_per_threadgroup(512)]]
void decode_packed_tiles(device const uint* w0 [[buffer(0)]], device const uint* w1 [[buffer(1)]],
                         device const uint* w2 [[buffer(2)]], device const ushort* s0 [[buffer(3)]],
                         device const ushort* s1 [[buffer(4)]], device const ushort* s2 [[buffer(5)]],
                         device const ushort* g0 [[buffer(6)]], device const ushort* g1 [[buffer(7)]],
                         device const ushort* g2 [[buffer(8)]], device const ushort* b0 [[buffer(9)]],
                         device const ushort* b1 [[buffer(10)]], device const ushort* b2 [[buffer(11)]],
                         device const float* vectors [[buffer(12)]], device const ushort* norm [[buffer(13)]],
                         device float* results [[buffer(14)]], constant PackedProductParams& p [[buffer(15)]],
                         uint group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
                         uint simdgroup [[simdgroup_index_in_threadgroup]],
                         uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup SharedTiles shared;
  PackedTileRows<T, BITS> rows;
  rows.w0 = w0, rows.w1 = w1, rows.w2 = w2;
  rows.s0 = s0, rows.s1 = s1, rows.s2 = s2;
  rows.g0 = g0, rows.g1 = g1, rows.g2 = g2;
  rows.format = &p.format;
  multiply_tiles<T, GATED, PackedTile<BITS>>(rows, b0, b1, b2, vectors, norm, results, p.product, shared, group, lane,
                                             simdgroup, simdgroups);
}

#define PACKED_TILES(name, T, BITS)                                                   \
  KERNEL("decode_packed_tiles_" #name "_" #BITS, decode_packed_tiles<T, BITS, false>) \
  KERNEL("decode_packed_tiles_gated_" #name "_" #BITS, decode_packed_tiles<T, BITS, true>)
PACKED_TILES(f16, half, 4)
PACKED_TILES(f16, half, 8)
PACKED_TILES(bf16, bfloat, 4)
PACKED_TILES(bf16, bfloat, 8)
