// Products of a matrix of four bits with one vector on the matrix units, for matrices with many rows. A norm before a
// product, and operations after it (bias, residual, activation), are fused.
//
// The threads of a threadgroup stage the vector together. Then each simdgroup multiplies its tiles.
#include <metal_stdlib>
#include "common/activation.metal.h"
#include "common/kernel.metal.h"
#include "decode/multiply.metal.h"
#include "quantized/exact_product.metal.h"
#include "quantized/packed_tile.metal.h"
using namespace metal;
using namespace torch_fused;

// What a lane holds of a tile: words of two rows, with the scales and biases of one half's groups, as bits.
template <int WORDS>
struct PackedTile {
  uint words[2][WORDS], scales[2], biases[2];
};

// Which words and groups a lane loads. Past the end, of a row or of half a tile, what comes last is loaded again: it is
// multiplied with zeros or not at all.
struct TileSpan {
  uint words, half_words;  // from a tile's first word to the lane's own, and to its half's
  uint group_shift;        // the binary logarithm of a group's words
  uint last_word, last_group;
};

template <typename S, int WORDS>
inline void load_tile(thread PackedTile<WORDS>& tile, thread const PackedRow* rows, uint first, TileSpan span) {
  const uint word = min(first + span.words, span.last_word);
  const uint group = min((first + span.half_words) >> span.group_shift, span.last_group);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    if (WORDS == 4) {
      const uint4 raw = read_once((device const uint4*)(rows[r].words + word));
      tile.words[r][0] = raw.x, tile.words[r][1] = raw.y, tile.words[r][2] = raw.z, tile.words[r][3] = raw.w;
    } else {
      const uint2 raw = read_once((device const uint2*)(rows[r].words + word));
      tile.words[r][0] = raw.x, tile.words[r][1] = raw.y;
    }
    tile.scales[r] = bits_of(((device const S*)rows[r].scales)[group]);
    tile.biases[r] = bits_of(((device const S*)rows[r].biases)[group]);
  }
}

template <int WORDS>
inline void copy_tile(thread PackedTile<WORDS>& to, thread const PackedTile<WORDS>& from) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
#pragma unroll
    for (int i = 0; i < WORDS; i++) to.words[r][i] = from.words[r][i];
    to.scales[r] = from.scales[r], to.biases[r] = from.biases[r];
  }
}

// What a kernel needs of its threadgroup: sums are of the staged values, half a tile each, squares of each simdgroup's.
struct SharedVector {
  uint4 staged[kStagedRows * (kStagedWords + 4)];
  float sums[kStagedWords / 4];
  float squares[kMostTileSimdgroups];
};

// Stages the vector from column `begin` on, with the norm's weights, as far as there is room; returns the sum of
// squares of what the thread staged.
template <typename T, typename X, int WORDS>
inline float stage_vector(threadgroup SharedVector& shared, device const X* vector, device const T* norm,
                          constant ProductParams& p, uint begin, uint thread_id, uint threads) {
  constexpr uint SUMMED = 2 * WORDS;                                                   // words of half a tile's row
  const uint words = min(kStagedWords, ((p.cols - begin) / kWordCodes + 31u) & ~31u);  // whole simdgroups take part
  float squares = 0.0f;
  for (uint word = thread_id; word < words; word += threads) {
    const uint column = begin + word * kWordCodes;
    Pack<X, kWordCodes> pack;
    Pack<T, kWordCodes> weights;
    load_pack<X, true>(vector, column, p.cols, pack);
    if (p.flags & kNormed) load_pack<T, true>(norm, column, p.cols, weights);
    float x[kWordCodes], sum = 0.0f;
    pack.unpack(x);
#pragma unroll
    for (uint j = 0; j < kWordCodes; j++) {
      squares = fma(x[j], x[j], squares);
      if (p.flags & kNormed) x[j] *= weights.get(j) + p.norm_offset;
      sum += x[j];
    }
#pragma unroll
    for (uint distance = 1; distance < SUMMED; distance *= 2) sum += simd_shuffle_xor(sum, ushort(distance));
    if (word % SUMMED == 0) shared.sums[word / SUMMED] = sum;
    stage_word(shared.staged, staged_place<WORDS>(word), x);
  }
  return squares;
}

// The matrices of a product, one below the other.
struct PackedMatrices {
  device const uint *w0, *w1, *w2;
  device const ushort *s0, *s1, *s2;
  device const ushort *g0, *g1, *g2;
};

// Loads a simdgroup's tiles one after the other: those of some rows, and then of the rows of its next round. GATED: a
// tile has eight rows of a gate and the same of an up.
template <typename T, int WORDS, bool GATED>
struct TileSource {
  PackedMatrices m;
  constant PackedProductParams* packed;
  PackedGroups<T, true> groups;
  TileSpan span;
  uint first, tile, tiles, rounds;  // the lane's first row, the tile that comes next and all of a row, rounds to come
  PackedRow rows[2];

  // The lane's row i of a tile; past the last one that one is taken again.
  PackedRow row(uint first_row, uint i) const {
    constant ProductParams& p = packed->product;
    constant PackedFormat& format = packed->format;
    const uint index = min(GATED ? first_row : first_row + 8 * i, p.ends[GATED ? 0 : 2] - 1);
    const uint of = GATED ? i : uint(index >= p.ends[0]) + uint(index >= p.ends[1]);
    return packed_row(of == 0 ? m.w0 : of == 1 ? m.w1 : m.w2, of == 0 ? m.s0 : of == 1 ? m.s1 : m.s2,
                      of == 0 ? m.g0 : of == 1 ? m.g1 : m.g2, GATED || of == 0 ? index : index - p.ends[of - 1],
                      format.strides[of], format.scale_strides[of], format.bias_strides[of], groups);
  }

  void point_rows() {
#pragma unroll
    for (uint i = 0; i < 2; i++) rows[i] = row(first, i);
  }
};

template <typename T, int WORDS, bool GATED>
inline void load_next(thread PackedTile<WORDS>& to, thread TileSource<T, WORDS, GATED>& source) {
  if (source.tile >= source.tiles && source.rounds > 0) {  // rows of several rounds are not split
    source.rounds--;
    source.tile = 0;
    source.first += GATED ? 8 : 16;
    source.point_rows();
  }
  load_tile<T>(to, source.rows, source.tile * 4 * WORDS, source.span);
  source.tile += source.packed->product.splits;
}

// What a lane's two sums are the results of.
template <typename T, typename X, int WORDS, bool GATED>
inline void write_results(thread float* values, thread const TileSource<T, WORDS, GATED>& source, uint first,
                          device const ushort* b0, device const ushort* b1, device const ushort* b2,
                          device const X* vector, device const T* norm, device X* results,
                          threadgroup const SharedVector& shared, uint simdgroups) {
  constant ProductParams& p = source.packed->product;
  const uint last = p.ends[GATED ? 0 : 2] - 1;
  float scale = 1.0f;
  if (p.flags & kNormed) {
    float all = 0.0f;
    for (uint s = 0; s < simdgroups; s++) all += shared.squares[s];
    scale = rsqrt(all / float(p.cols) + p.eps);
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (isfinite(values[i])) continue;
    values[i] = exact_product<4, T, X>(source.row(first, i), vector, norm, source.groups, p);
  }
#pragma unroll
  for (uint i = 0; i < (GATED ? 1 : 2); i++) {
    const uint row = first + 8 * i, of = uint(row >= p.ends[0]) + uint(row >= p.ends[1]);
    if (row > last) continue;
    float value = values[i] * scale;
    if (GATED) value = activate(value, p.activation) * (values[1] * scale);
    if (!GATED && p.flags & (kBias << of)) {
      value += float(((device const T*)(of == 0 ? b0 : of == 1 ? b1 : b2))[of == 0 ? row : row - p.ends[of - 1]]);
    }
    device X* place = results + row;
    *place = X(fma(value, p.scale, p.flags & kAdd ? float(*place) : 0.0f));
  }
}

// T is the type of scales, norms and biases, X that of vectors and results. GATED: the result is activation(gate) * up.
template <typename T, typename X, int WORDS, bool GATED>
inline void multiply_packed(PackedMatrices matrices, device const ushort* b0, device const ushort* b1,
                            device const ushort* b2, device const X* vectors, device const ushort* norm,
                            device X* results, constant PackedProductParams& packed, threadgroup SharedVector& shared,
                            uint group, uint thread_id, uint lane, uint simdgroup, uint simdgroups) {
  constexpr uint TILE = 4 * WORDS, TILES = kStagedWords / TILE;  // words of a tile's row; tiles that are staged at once
  constexpr uint OUTPUTS = GATED ? 1 : 2;                        // rows of a lane's results
  constexpr float CODES = 16.0f;                                 // a code is CODES * (what stands for it - 1)
  constant ProductParams& p = packed.product;
  TileLane lanes;
  tile_lane(lane, lanes);
  const uint splits = p.splits, split = simdgroup % splits, one = packed.format.one;
  const uint slot = group * (simdgroups / splits) + simdgroup / splits;
  uint first = slot * p.rounds * 8 * OUTPUTS + lanes.row, tile = split;

  TileSource<T, WORDS, GATED> source;
  source.m = matrices;
  source.packed = &packed;
  source.groups = packed_groups<T, true>(packed.format.group_size, packed.format.scale_format);
  source.span = {lanes.pair * WORDS, lanes.result / 4 * TILE / 2, source.groups.shift - 3, p.cols / kWordCodes - WORDS,
                 (p.cols >> source.groups.shift) - 1};
  source.first = first, source.tile = split + 2 * splits, source.rounds = p.rounds - 1;
  source.tiles = (p.cols / kWordCodes + TILE - 1) / TILE;
  source.point_rows();
  const uint tiles = source.tiles;
  PackedTile<WORDS> now, next;
  load_tile<T>(now, source.rows, tile * TILE, source.span);
  load_tile<T>(next, source.rows, (tile + splits) * TILE, source.span);
  previous_launch_done(lane);

  device const X* vector = vectors + vector_offset(p, 0);
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f}, shifts[2] = {0.0f, 0.0f}, squares = 0.0f;
  for (uint stage = 0; stage < tiles; stage += TILES) {
    if (stage > 0) threadgroup_barrier(mem_flags::mem_threadgroup);  // all are done with what was staged
    squares += stage_vector<T, X, WORDS>(shared, vector, (device const T*)norm, p, stage * TILE * kWordCodes, thread_id,
                                         simdgroups * 32);
    const float all = simd_sum(squares);
    if (lane == 0) shared.squares[simdgroup] = all;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const uint end = min(stage + TILES, tiles);
    for (uint round = 0; round < p.rounds; round++) {
#pragma unroll 2
      for (; tile < end; tile += splits) {
        PackedTile<WORDS> after;  // two tiles are under way while one is multiplied
        load_next(after, source);
        float products[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
          const uint pair[2] = {now.words[0][i], now.words[1][i]};
          multiply_word<WORDS>(products, pair, shared.staged, (tile - stage) * TILE, i, lanes, one);
        }
        const float sum = shared.sums[(tile - stage) * 2 + lanes.result / 4];
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const float scale = CODES * value_of<T>(now.scales[r]);
          shifts[r] = fma(value_of<T>(now.biases[r]) - scale, sum, shifts[r]);
          sums[2 * r] = fma(scale, products[2 * r], sums[2 * r]);
          sums[2 * r + 1] = fma(scale, products[2 * r + 1], sums[2 * r + 1]);
        }
        copy_tile(now, next);
        copy_tile(next, after);
      }
      if (end < tiles) continue;  // a single round, whose next columns are staged first

      float values[2];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        values[r] = sums[2 * r] + sums[2 * r + 1] + (lanes.result % 4 == 0 ? shifts[r] : 0.0f);
        sums[2 * r] = sums[2 * r + 1] = shifts[r] = 0.0f;
      }
      sum_columns(values, lane);
      if (splits > 1) {
        threadgroup float2* parts = (threadgroup float2*)shared.staged;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        parts[simdgroup * 32 + lane] = float2(values[0], values[1]);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint s = 1; split == 0 && s < splits; s++) {
          const float2 more = parts[(simdgroup + s) * 32 + lane];
          values[0] += more.x, values[1] += more.y;
        }
      }
      if (split == 0 && lanes.result == 0) {
        write_results<T, X, WORDS, GATED>(values, source, first, b0, b1, b2, vector, (device const T*)norm, results,
                                          shared, simdgroups);
      }
      first += 8 * OUTPUTS;
      tile = 0;
    }
  }
}

// The limit on threads is one on registers: so that five threadgroups of 128 threads have room on one of NVIDIA's
// multiprocessors at once.
template <typename T, typename X, int WORDS>
[[kernel, max_total_threads_per_threadgroup(640)]]
void packed_tiles(device const uint* w0 [[buffer(0)]], device const uint* w1 [[buffer(1)]],
                  device const uint* w2 [[buffer(2)]], device const ushort* s0 [[buffer(3)]],
                  device const ushort* s1 [[buffer(4)]], device const ushort* s2 [[buffer(5)]],
                  device const ushort* g0 [[buffer(6)]], device const ushort* g1 [[buffer(7)]],
                  device const ushort* g2 [[buffer(8)]], device const ushort* b0 [[buffer(9)]],
                  device const ushort* b1 [[buffer(10)]], device const ushort* b2 [[buffer(11)]],
                  device const X* vectors [[buffer(12)]], device const ushort* norm [[buffer(13)]],
                  device X* results [[buffer(14)]], constant PackedProductParams& p [[buffer(15)]],
                  uint group [[threadgroup_position_in_grid]], uint thread_id [[thread_position_in_threadgroup]],
                  uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                  uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup SharedVector shared;
  multiply_packed<T, X, WORDS, false>({w0, w1, w2, s0, s1, s2, g0, g1, g2}, b0, b1, b2, vectors, norm, results, p,
                                      shared, group, thread_id, lane, simdgroup, simdgroups);
}

// More registers gain more here than more threadgroups.
template <typename T, int WORDS>
[[kernel, max_total_threads_per_threadgroup(512)]]
void packed_tiles_gated(device const uint* w0 [[buffer(0)]], device const uint* w1 [[buffer(1)]],
                        device const uint* w2 [[buffer(2)]], device const ushort* s0 [[buffer(3)]],
                        device const ushort* s1 [[buffer(4)]], device const ushort* s2 [[buffer(5)]],
                        device const ushort* g0 [[buffer(6)]], device const ushort* g1 [[buffer(7)]],
                        device const ushort* g2 [[buffer(8)]], device const ushort* b0 [[buffer(9)]],
                        device const ushort* b1 [[buffer(10)]], device const ushort* b2 [[buffer(11)]],
                        device const float* vectors [[buffer(12)]], device const ushort* norm [[buffer(13)]],
                        device float* results [[buffer(14)]], constant PackedProductParams& p [[buffer(15)]],
                        uint group [[threadgroup_position_in_grid]], uint thread_id [[thread_position_in_threadgroup]],
                        uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                        uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup SharedVector shared;
  multiply_packed<T, float, WORDS, true>({w0, w1, w2, s0, s1, s2, g0, g1, g2}, b0, b1, b2, vectors, norm, results, p,
                                         shared, group, thread_id, lane, simdgroup, simdgroups);
}

// With four words a lane, half a tile's row is in one group of 64 columns or more; with two, in one of 32.
#define PACKED_TILES(name, T, WORDS)                                           \
  KERNEL("packed_tiles_" #name "_" #WORDS, packed_tiles<T, float, WORDS>)      \
  KERNEL("packed_tiles_gated_" #name "_" #WORDS, packed_tiles_gated<T, WORDS>) \
  KERNEL("packed_tiles_linear_" #name "_" #WORDS, packed_tiles<T, T, WORDS>)
PACKED_TILES(f16, half, 4)
PACKED_TILES(f16, half, 2)
PACKED_TILES(bf16, bfloat, 4)
PACKED_TILES(bf16, bfloat, 2)
