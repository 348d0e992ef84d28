// How a lane reads and multiplies the rows of a packed matrix.
#pragma once
#include <metal_stdlib>
#include "decode/decode_params.h"
#include "decode/vectors.metal.h"
using namespace metal;
using namespace torch_fused;

// Sums over a lane's values x: of all, and of each one's `offset`.
struct ColumnSums {
  float all, offsets;
};

// W columns of a row, all in one group, with its scale and bias as they lie in memory: a thread that converts what it
// loads waits for it, and all loads of a kernel should be under way together.
//
// A code is not converted from an integer: its bits become part of a float's mantissa, whose exponent is that of `one`.
// Eight bits, moved to its upper ones, are 1 + code / 256, and four are 1 + code / 16. PAIRED: two codes of four bits are
// moved at once, and the first is 1 + code / 256: less exact by four bits, so for scales of 16 bits only.
template <int BITS, int W, typename S = float>
struct PackedPack {
  uint words[BITS * W / 32];
  S scale, bias;

  int code(int j) const { return int(words[j * BITS / 32] >> (j * BITS % 32) & ((1u << BITS) - 1u)); }

  static constant constexpr bool PAIRED = BITS == 4 && sizeof(S) == 2;

  static float offset(int j) { return BITS == 8 || (PAIRED && j % 2 == 0) ? 256.0f : 16.0f; }

  // (offset(j) + code(j)) / offset(j), given the bits of 1.0f.
  float fraction(int j, uint one) const {
    const uint word = words[j * BITS / 32];
    const int to = offset(j) == 256.0f ? 15 : 19, at = j * BITS % 32, by = to - at;
    const uint moved = by > 0 ? word << by : word >> -by;
    return as_type<float>((moved & ((1u << BITS) - 1u) << to) | one);
  }

  // Column j's weight.
  float get(int j) const {
    const float step = float(scale) * offset(j);
    return fma(step, fraction(j, kOne), float(bias) - step);
  }

  // The product with W values. `one` should be no constant to the compiler: an NVIDIA instruction takes only one, and
  // that is the mask.
  float product(thread const float* x, ColumnSums sums, uint one) const {
    float lower = 0.0f, upper = 0.0f;
#pragma unroll
    for (int j = 0; j < W; j++) {
      thread float& part = offset(j) == 16.0f ? upper : lower;
      part = fma(fraction(j, one), x[j], part);
    }
    const float codes = fma(256.0f, lower, fma(16.0f, upper, -sums.offsets));
    return fma(float(scale), codes, float(bias) * sums.all);
  }

  // The same weight by weight: where infinities or overflows cancel above, this is the unpacked row's product.
  float exact_product(thread const float* x) const {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < W; j++) sum += (float(scale) * float(code(j)) + float(bias)) * x[j];
    return sum;
  }
};

// Adds the products of R rows' columns with W values to as many sums.
template <int R, int U, int BITS, int W, typename S>
inline void add_products(thread const PackedPack<BITS, W, S> (&packs)[R][U], int u, thread const float* x, uint one,
                         thread float (&sums)[R]) {
  typedef PackedPack<BITS, W, S> Packed;
  float parts[2] = {0.0f, 0.0f};
#pragma unroll
  for (int j = 0; j < W; j++) parts[j % 2] += x[j];
  const ColumnSums of_x = {parts[0] + parts[1], fma(Packed::offset(0), parts[0], Packed::offset(1) * parts[1])};
#pragma unroll
  for (int r = 0; r < R; r++) sums[r] += packs[r][u].product(x, of_x, one);
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
      const uint4 raw = inside ? read_once((device const uint4*)(from + i)) : uint4(0u);
      pack.words[i] = raw.x;
      pack.words[i + 1] = raw.y;
      pack.words[i + 2] = raw.z;
      pack.words[i + 3] = raw.w;
    } else if (WHOLE && WORDS % 2 == 0) {
      const uint2 raw = inside ? read_once((device const uint2*)(from + i)) : uint2(0u);
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
