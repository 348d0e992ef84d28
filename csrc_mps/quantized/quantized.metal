// Products of a packed matrix's rows with a few vectors, a simdgroup or several a row, and unpacking for more vectors.
//
// A lane takes sixteen columns of every block of 512: of four bits two words, of eight four.
#include <metal_stdlib>
#include "common/kernel.metal.h"
#include "common/pack.metal.h"
#include "decode/product.metal.h"
#include "quantized/packed.metal.h"
#include "quantized/quantized_params.h"
using namespace metal;
using namespace torch_fused;

constant constexpr int W = kPackedColumns;

template <bool WHOLE>
struct OffsetOf {
  typedef ulong type;
};
template <>
struct OffsetOf<true> {
  typedef uint type;
};
template <bool WHOLE>
using Offset = typename OffsetOf<WHOLE>::type;

// A lane's part of a row's product, weight by weight.
template <typename T, int BITS, int U, bool WHOLE, typename S>
inline float exact_sum(PackedRow row, device const T* vector, uint split, uint lane, PackedGroups<S, WHOLE> groups,
                       constant QuantizedParams& p) {
  float sum = 0.0f;
#pragma unroll 1
  for (uint block = split * U; block * kPackedBlock < p.cols; block += block % U == U - 1 ? (p.splits - 1) * U + 1 : 1) {
    const uint column = block * kPackedBlock + lane * W;
    if (column >= p.cols) continue;
    float values[W];
    Pack<T, W> pack;
    load_pack<T, WHOLE>(vector, column, p.cols, pack);
    pack.unpack(values);
    PackedPack<BITS, W, S> weights;
    load_packed<BITS, W, WHOLE>(row, column, true, groups, weights);
    sum += weights.exact_product(values);
  }
  return sum;
}

// R rows at once with C vectors, U blocks of columns at once. WHOLE: all is aligned, scales and biases are S, with the
// same strides, and offsets fit in 32 bits; else they are of any type, and S is float.
template <typename T, typename S, int BITS, int C, int R, int U, bool WHOLE>
[[kernel, max_total_threads_per_threadgroup(256)]]
void quantized_product(device const uint* weight [[buffer(0)]], device const ushort* scales [[buffer(1)]],
                       device const ushort* biases [[buffer(2)]], device const T* x [[buffer(3)]],
                       device const T* bias [[buffer(4)]], device T* output [[buffer(5)]],
                       constant QuantizedParams& p [[buffer(6)]], uint group [[threadgroup_position_in_grid]],
                       uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                       uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float scratch[8 * 32];
  const uint blocks = (p.vectors + C - 1) / C, slots = simdgroups / p.splits;
  const uint first_vector = group % blocks * C, split = simdgroup % p.splits;
  const uint first = (group / blocks * slots + simdgroup / p.splits) * R;

  const PackedGroups<S, WHOLE> groups = packed_groups<S, WHOLE>(p.group_size, p.scale_format);
  // Where rows begin, in words and in ushorts. Pointers would be two registers each.
  Offset<WHOLE> words_at[R], scales_at[R], biases_at[R];
#pragma unroll
  for (int r = 0; r < R; r++) {
    const uint row = min(first + r, p.rows - 1);
    words_at[r] = Offset<WHOLE>(row) * Offset<WHOLE>(p.weight_stride);
    scales_at[r] = Offset<WHOLE>(row) * Offset<WHOLE>(p.scales_stride) * groups.size();
    biases_at[r] = WHOLE ? scales_at[r] : Offset<WHOLE>(row) * Offset<WHOLE>(p.biases_stride) * groups.size();
  }
  float sums[C][R];
#pragma unroll
  for (int i = 0; i < R * C; i++) sums[i / R][i % R] = 0.0f;

  for (uint begin = split * U * kPackedBlock; begin < p.cols; begin += p.splits * U * kPackedBlock) {
    // All rows are under way before the first is needed.
    PackedPack<BITS, W, S> packs[R][U];
#pragma unroll
    for (int u = 0; u < U; u++) {
#pragma unroll
      for (int r = 0; r < R; r++) {
        const uint column = begin + u * kPackedBlock + lane * W, group = groups.before(column);
        const PackedRow from = {weight + (words_at[r] + column / (32 / BITS)), scales + (scales_at[r] + group),
                                biases + (biases_at[r] + group)};
        load_packed<BITS, W, WHOLE>(from, 0, column < p.cols, groups, packs[r][u]);
      }
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
      const uint column = begin + u * kPackedBlock + lane * W;
      if (column >= p.cols) continue;
#pragma unroll
      for (int c = 0; c < C; c++) {
        float values[W];
        Pack<T, W> pack;
        load_pack<T, WHOLE>(x + long(min(first_vector + c, p.vectors - 1)) * p.x_stride, column, p.cols, pack);
        pack.unpack(values);
        add_products(packs, u, values, p.one, sums[c]);
      }
    }
  }

#pragma unroll
  for (int i = 0; i < R * C; i++) {
    if (isfinite(sums[i / R][i % R])) continue;
    const int c = i / R, r = i % R;
    const PackedRow row = {weight + words_at[r], scales + scales_at[r], biases + biases_at[r]};
    device const T* vector = x + long(min(first_vector + c, p.vectors - 1)) * p.x_stride;
    sums[c][r] = exact_sum<T, BITS, U, WHOLE>(row, vector, split, lane, groups, p);
  }

  // Each result is a lane's: the vectors of a row, then those of the next.
  float results[R * C];
#pragma unroll
  for (int i = 0; i < R * C; i++) results[i] = sums[i % C][i / C];
  float sum = sum_of_each<R * C>(results, lane);
  if (p.splits > 1) {
    scratch[simdgroup * 32 + lane] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint s = 1; s < p.splits && split == 0; s++) sum += scratch[(simdgroup + s) * 32 + lane];
  }
  const uint row = first + lane / C, vector = first_vector + lane % C;
  if (split > 0 || lane >= uint(R * C) || row >= p.rows || vector >= p.vectors) return;
  output[ulong(vector) * p.rows + row] = T(sum + (p.flags & kHasBias ? float(bias[row]) : 0.0f));
}

// A thread unpacks eight columns of a row.
template <typename T, int BITS>
[[kernel, max_total_threads_per_threadgroup(256)]]
void quantized_unpack(device const uint* weight [[buffer(0)]], device const ushort* scales [[buffer(1)]],
                      device const ushort* biases [[buffer(2)]], device T* output [[buffer(3)]],
                      constant UnpackParams& p [[buffer(4)]], uint group [[threadgroup_position_in_grid]],
                      uint thread_id [[thread_position_in_threadgroup]], uint threads [[threads_per_threadgroup]]) {
  constexpr int N = kUnpackedColumns;
  const uint row = group / p.groups;
  const uint column = (group % p.groups * threads + thread_id) * N;
  const PackedGroups<float, false> groups = packed_groups<float, false>(p.group_size, p.scale_format);
  const PackedRow from = packed_row(weight, scales, biases, row, p.weight_stride, p.scales_stride, p.biases_stride,
                                    groups);
  PackedPack<BITS, N> pack;
  load_packed<BITS, N, false>(from, column, column < p.cols, groups, pack);
  float values[N];
#pragma unroll
  for (int j = 0; j < N; j++) values[j] = pack.scale * float(pack.code(j)) + pack.bias;
  store_columns<N>(output + ulong(row) * p.cols, column, p.cols, p.aligned, values);
}

#define QUANTIZED(name, T, BITS)                                                                       \
  KERNEL("quantized_product_" #BITS "_" #name "_1", quantized_product<T, T, BITS, 1, 4, 8 / BITS, true>)      \
  KERNEL("quantized_product_" #BITS "_" #name "_8", quantized_product<T, T, BITS, 8, 4, 1, true>)      \
  KERNEL("quantized_product_" #BITS "_" #name "_0", quantized_product<T, float, BITS, 1, 2, 1, false>) \
  KERNEL("quantized_unpack_" #name "_" #BITS, quantized_unpack<T, BITS>)
QUANTIZED(f32, float, 4)
QUANTIZED(f32, float, 8)
QUANTIZED(f16, half, 4)
QUANTIZED(f16, half, 8)
QUANTIZED(bf16, bfloat, 4)
QUANTIZED(bf16, bfloat, 8)
