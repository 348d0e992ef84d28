// How a lane reads and multiplies the rows of a packed matrix.
#pragma once
#include <metal_stdlib>
#include "decode/vectors.metal.h"
using namespace metal;
using namespace torch_fused;

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
    return as_type<float>((moved & ((1u << BITS) - 1u) << TO) | 0x3f800000u);
  }

  // Column j's weight.
  float get(int j) const {
    const float step = float(scale) * float(1 << BITS);
    return fma(step, fraction(j), float(bias) - step);
  }

  // The product with W values, whose sum is `sum`. Where infinities or overflows cancel it would be no number; weight
  // by weight it is the unpacked row's.
  float product(thread const float* x, float sum) const {
    float dot = 0.0f;
#pragma unroll
    for (int j = 0; j < W; j++) dot = fma(fraction(j), x[j], dot);
    const float step = float(scale) * float(1 << BITS);
    const float result = fma(step, dot, (float(bias) - step) * sum);
    if (isfinite(result)) return result;
    float exact = 0.0f;
    for (int j = 0; j < W; j++) exact += (float(scale) * float(code(j)) + float(bias)) * x[j];
    return exact;
  }
};

// A packed matrix's row.
struct PackedRow {
  device const uint* words;
  device const ushort* scales;
  device const ushort* biases;
};

// Row `row` of a matrix whose scales have two or four bytes.
inline PackedRow packed_row(device const uint* words, device const ushort* scales, device const ushort* biases,
                            long row, long stride, long scales_stride, long biases_stride, uint format) {
  const long size = format == kFloat32 ? 2 : 1;
  return {words + row * stride, scales + row * scales_stride * size, biases + row * biases_stride * size};
}

// The columns from `column` on, zeros past the end. WHOLE: rows start at 16 bytes. TYPED: scales and biases are S, else
// as `format` says.
template <int BITS, int W, bool WHOLE, typename S = float, bool TYPED = false>
inline void load_packed(PackedRow row, uint column, uint cols, uint group_size, uint format,
                        thread PackedPack<BITS, W, S>& pack) {
  constexpr int WORDS = BITS * W / 32;
  const bool inside = column < cols;
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
  const ulong group = column >> (31u - clz(group_size));  // a power of two
  if (TYPED) {
    pack.scale = inside ? ((device const S*)row.scales)[group] : S(0.0f);
    pack.bias = inside ? ((device const S*)row.biases)[group] : S(0.0f);
  } else {
    pack.scale = S(inside ? vector_at<S, false>(row.scales, format, group) : 0.0f);
    pack.bias = S(inside ? vector_at<S, false>(row.biases, format, group) : 0.0f);
  }
}
