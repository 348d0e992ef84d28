// Products of a 16-bit matrix's rows with several vectors on the matrix units.
#include <metal_stdlib>
#include "decode/tiles.metal.h"
using namespace metal;
using namespace torch_fused;

// What a lane holds of a tile: two runs of two rows.
template <typename T>
struct DenseTile {
  Pack<T, N> runs[2][2];
};

template <typename T>
struct DenseTileRows {
  device const T *w0, *w1, *w2;
  constant ProductParams* p;
  device const T* at[2];

  void point(uint i, uint of, uint row) { at[i] = (of == 0 ? w0 : of == 1 ? w1 : w2) + long(row) * p->strides[of]; }
};

template <typename T>
inline void load_tile(thread const DenseTileRows<T>& rows, uint pair, uint column, uint cols,
                      thread DenseTile<T>& tile) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    load_pack<T, true, true>(rows.at[i / 2], column + run_column(pair, i % 2), cols, tile.runs[i / 2][i % 2]);
  }
}

template <typename T>
inline void copy_tile(thread DenseTile<T>& to, thread const DenseTile<T>& from) {
#pragma unroll
  for (int i = 0; i < 16; i++) to.runs[i / 8][i / 4 % 2].words[i % 4] = from.runs[i / 8][i / 4 % 2].words[i % 4];
}

// Column j of the lane's runs.
template <typename T>
inline void tile_weights(thread const DenseTileRows<T>&, thread const DenseTile<T>& tile, int j, thread float* w) {
#pragma unroll
  for (int i = 0; i < 4; i++) w[i] = tile.runs[i / 2][i % 2].get(j);
}

// The products of all tiles are added up as they are.
template <typename T>
inline void end_tile(thread const DenseTileRows<T>&, thread const DenseTile<T>&, thread const float*,
                     thread const float*, uint, thread float*, thread float*, thread float*) {}

template <typename T>
inline void multiply_again(thread const DenseTileRows<T>&, int, device const float*, device const ushort*,
                           constant ProductParams&, thread float&) {}

template <typename T, bool GATED>
[[kernel, max_total_threads_per_threadgroup(512)]]
void decode_tiles(device const T* w0 [[buffer(0)]], device const T* w1 [[buffer(1)]], device const T* w2 [[buffer(2)]],
                  device const ushort* b0 [[buffer(3)]], device const ushort* b1 [[buffer(4)]],
                  device const ushort* b2 [[buffer(5)]], device const float* vectors [[buffer(6)]],
                  device const ushort* norm [[buffer(7)]], device float* results [[buffer(8)]],
                  constant ProductParams& p [[buffer(9)]], uint group [[threadgroup_position_in_grid]],
                  uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                  uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup SharedTiles shared;
  DenseTileRows<T> rows;
  rows.w0 = w0, rows.w1 = w1, rows.w2 = w2;
  rows.p = &p;
  multiply_tiles<T, GATED, DenseTile<T>>(rows, b0, b1, b2, vectors, norm, results, p, shared, group, lane, simdgroup,
                                         simdgroups);
}

#define TILES(name, T)                                  \
  KERNEL("decode_tiles_" #name, decode_tiles<T, false>) \
  KERNEL("decode_tiles_gated_" #name, decode_tiles<T, true>)
TILES(f16, half)
TILES(bf16, bfloat)
