// How a lane reads and multiplies the rows of a packed matrix.
#pragma once
#include <metal_stdlib>
#include "decode/vectors.metal.h"
using namespace metal;
using namespace torch_fused;

// A constant that an instruction is not given as an immediate. On NVIDIA one takes a single immediate: cuda.h has the
// overload for uint.
template <typename Constant>
inline Constant in_register(Constant value) {
  return value;
}

// W columns of a row, all in one group, with its scale and bias as they lie in memory: a thread that converts what it
// loads waits for it, and all loads of a kernel should be under way together.
template <int BITS, int W, typename S = float>
struct PackedPack {
  uint words[BITS * W / 32];
  S scale, bias;

  int code(int j) const { return int(words[j * BITS / 32] >> (j * BITS % 32) & ((1u << BITS) - 1u)); }

  // 1 + code / 2^BITS: the code's bits become the first of a float's mantissa, so that no integer is converted.
  float fraction(int j) const {
    constexpr int TO = 23 - BITS;
    const int at = j * BITS % 32;
    const uint word = words[j * BITS / 32], moved = at <= TO ? word << (TO - at) : word >> (at - TO);
    return as_type<float>((moved & in_register(((1u << BITS) - 1u) << TO)) | in_register(0x3f800000u));
  }

  // Column j's weight.
  float get(int j) const {
    const float step = float(scale) * float(1 << BITS);
    return fma(step, fraction(j), float(bias) - step);
  }

  // The product with W values, whose sum is `sum`.
  float product(thread const float* x, float sum) const {
    float dot = 0.0f;
#pragma unroll
    for (int j = 0; j < W; j++) dot = fma(fraction(j), x[j], dot);
    const float step = float(scale) * float(1 << BITS);
    return fma(step, dot, (float(bias) - step) * sum);
  }

  // The same weight by weight: where infinities or overflows cancel above, this is the unpacked row's product.
  float exact_product(thread const float* x) const {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < W; j++) sum += (float(scale) * float(code(j)) + float(bias)) * x[j];
    return sum;
  }
};

// Adds the products of R rows' columns with W values, whose sum is `total`, to as many sums.
template <int R, int U, int BITS, int W, typename S>
inline void add_products(thread const PackedPack<BITS, W, S> (&packs)[R][U], int u, thread const float* x, float total,
                         thread float (&sums)[R]) {
#pragma unroll
  for (int r = 0; r < R; r++) sums[r] += packs[r][u].product(x, total);
}

// A packed matrix's row from some column on. A loop moves it on, so that it holds no more than three pointers.
struct PackedRow {
  device const uint* words;
  device const ushort* scales;
  device const ushort* biases;
};

// What a column's place in scales and biases follows from. TYPED: they are S; else they have two or four bytes.
template <typename S, bool TYPED>
struct PackedGroups {
  uint shift;  // the binary logarithm of a group's columns
  uint format;

  uint size() const { return TYPED ? sizeof(S) / 2 : format == kFloat32 ? 2 : 1; }
  uint before(uint column) const { return (column >> shift) * size(); }
};

template <typename S, bool TYPED>
inline PackedGroups<S, TYPED> packed_groups(uint group_size, uint format) {
  return {31u - clz(group_size), format};
}

// Row `row` of a matrix.
template <typename S, bool TYPED>
inline PackedRow packed_row(device const uint* words, device const ushort* scales, device const ushort* biases,
                            ulong row, long stride, long scales_stride, long biases_stride,
                            PackedGroups<S, TYPED> groups) {
  return {words + row * stride, scales + row * scales_stride * groups.size(),
          biases + row * biases_stride * groups.size()};
}

template <int BITS, typename S, bool TYPED>
inline void move_on(thread PackedRow& row, uint columns, PackedGroups<S, TYPED> groups) {
  row.words += columns / (32 / BITS);
  row.scales += groups.before(columns);
  row.biases += groups.before(columns);
}

// The row from its first column on, after it was moved on by so many.
template <int BITS, typename S, bool TYPED>
inline PackedRow moved_back(PackedRow row, uint columns, PackedGroups<S, TYPED> groups) {
  return {row.words - columns / (32 / BITS), row.scales - groups.before(columns), row.biases - groups.before(columns)};
}

// W columns from `column` of the row's on; zeros if they are not `inside` of it. WHOLE: rows start at 16 bytes.
template <int BITS, int W, bool WHOLE, typename S, bool TYPED>
inline void load_packed(PackedRow row, uint column, bool inside, PackedGroups<S, TYPED> groups,
                        thread PackedPack<BITS, W, S>& pack) {
  constexpr int WORDS = BITS * W / 32;
  device const uint* from = row.words + column / (32 / BITS);
#pragma unroll
  for (int i = 0; i < WORDS; i += WHOLE && WORDS % 4 == 0 ? 4 : WHOLE && WORDS % 2 == 0 ? 2 : 1) {
    if (WHOLE && WORDS % 4 == 0) {
      const uint4 raw = inside ? *(device const uint4*)(from + i) : uint4(0u);
      pack.words[i] = raw.x;
      pack.words[i + 1] = raw.y;
      pack.words[i + 2] = raw.z;
      pack.words[i + 3] = raw.w;
    } else if (WHOLE && WORDS % 2 == 0) {
      const uint2 raw = inside ? *(device const uint2*)(from + i) : uint2(0u);
      pack.words[i] = raw.x;
      pack.words[i + 1] = raw.y;
    } else {
      pack.words[i] = inside ? from[i] : 0u;
    }
  }
  device const ushort *scale = row.scales + groups.before(column), *bias = row.biases + groups.before(column);
  if (TYPED) {
    pack.scale = inside ? *(device const S*)scale : S(0.0f);
    pack.bias = inside ? *(device const S*)bias : S(0.0f);
  } else {
    pack.scale = S(inside ? vector_at<S, false>(scale, groups.format, 0) : 0.0f);
    pack.bias = S(inside ? vector_at<S, false>(bias, groups.format, 0) : 0.0f);
  }
}
