// Products of a packed row with vectors of floats: codes become floats, and each group's sum is scaled once.
#pragma once

#include "../../decode/step/lanes.h"
#include "packed.h"

namespace torch_fused::TORCH_FUSED_TARGET {

typedef int32_t LaneInts __attribute__((vector_size(4 * kLanes)));
typedef uint8_t LaneBytes __attribute__((vector_size(kLanes)));

// Sixteen bytes as integers.
TORCH_FUSED_INLINE void load_bytes(const uint8_t* from, LaneInts& to) {
#ifdef TORCH_FUSED_AVX512
  to = (LaneInts)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(TORCH_FUSED_AVX2)
  const __m256i low = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  const __m256i high = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8)));
  std::memcpy(&to, &low, sizeof(low));
  std::memcpy(reinterpret_cast<char*>(&to) + sizeof(low), &high, sizeof(high));
#else
  LaneBytes bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
  to = __builtin_convertvector(bytes, LaneInts);
#endif
}

// The codes of a block, as the vectors are laid out.
template <int bits>
TORCH_FUSED_INLINE void load_codes(const uint8_t* from, Lanes (&to)[2]) {
  LaneInts bytes;
  load_bytes(from, bytes);
  if (bits == 4) {
    const LaneInts low = bytes & 15, high = bytes >> 4;
    to[0] = __builtin_convertvector(low, Lanes);
    to[1] = __builtin_convertvector(high, Lanes);
  } else {
    to[0] = __builtin_convertvector(bytes, Lanes);
    load_bytes(from + kLanes, bytes);
    to[1] = __builtin_convertvector(bytes, Lanes);
  }
}

// Calls place(column, i) for each column of a block, i its place there.
template <class Place>
TORCH_FUSED_INLINE void arranged(int64_t bits, Place place) {
  constexpr int64_t half = kCodeBlock / 2;
  if (bits == 4) {
    for (int64_t i = 0; i < half; ++i) place(2 * i, i);
    for (int64_t i = 0; i < half; ++i) place(2 * i + 1, half + i);
  } else {
    for (int64_t i = 0; i < kCodeBlock; ++i) place(i, i);
  }
}

TORCH_FUSED_INLINE void arrange_floats(const float* x, int64_t cols, int64_t bits, float* values, float* sums) {
  for (int64_t block = 0; block < cols / kCodeBlock; ++block, x += kCodeBlock, values += kCodeBlock) {
    arranged(bits, [&](int64_t column, int64_t i) __attribute__((always_inline)) { values[i] = x[column]; });
    Lanes half[2];
    load(values, half[0]);
    load(values + kLanes, half[1]);
    sums[block] = sum_of(half[0] + half[1]);
  }
}

// A scale or a bias.
TORCH_FUSED_INLINE float widen_one(float value) {
  return value;
}
TORCH_FUSED_INLINE float widen_one(c10::BFloat16 value) {
  return widen(value);
}
TORCH_FUSED_INLINE float widen_one(c10::Half value) {
#ifdef TORCH_FUSED_F16C
  return _cvtsh_ss(value.x);
#else
  return widen(value);
#endif
}

// One row: its codes, and a scale and a bias for every `blocks` blocks.
template <class S>
struct PackedRow {
  const uint8_t* codes;
  const S* scales;
  const S* biases;
  int64_t groups, blocks;
};

// Products with C vectors from `first` on.
template <int bits, int C, class S>
TORCH_FUSED_INLINE void packed_products(const PackedRow<S>& row, const FloatVectors& x, int64_t first, float* results) {
  const int64_t blocks = row.groups * row.blocks, cols = blocks * kCodeBlock;
  const float* values = x.values + first * cols;
  const float* sums = x.sums + first * blocks;
  const uint8_t* from = row.codes;
  Lanes totals[C] = {};
  float shifts[C] = {};
  for (int64_t group = 0; group < row.groups; ++group) {
    Lanes dots[C] = {};
    float of_group[C] = {};
    for (int64_t block = 0; block < row.blocks; ++block) {
      Lanes codes[2], value;
      load_codes<bits>(from, codes);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        load(values + c * cols, value);
        dots[c] += codes[0] * value;
        load(values + c * cols + kLanes, value);
        dots[c] += codes[1] * value;
        of_group[c] += sums[c * blocks];
      }
      from += kCodeBlock * bits / 8;
      values += kCodeBlock;
      ++sums;
    }
    const float scale = widen_one(row.scales[group]), bias = widen_one(row.biases[group]);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      totals[c] += scale * dots[c];
      shifts[c] += bias * of_group[c];
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) results[c] = sum_of(totals[c]) + shifts[c];
}

// The same, weight by weight. A sum above may be no number where infinities or overflows cancel; this one has the
// unpacked matrix's.
template <int bits, class S>
float exact_product(const PackedRow<S>& row, const FloatVectors& x, int64_t vector) {
  const int64_t cols = row.groups * row.blocks * kCodeBlock;
  const float* values = x.values + vector * cols;
  float result = 0;
  for (int64_t block = 0; block < row.groups * row.blocks; ++block) {
    const uint8_t* from = row.codes + block * kCodeBlock * bits / 8;
    const float scale = widen_one(row.scales[block / row.blocks]), bias = widen_one(row.biases[block / row.blocks]);
    arranged(bits, [&](int64_t column, int64_t i) {
      const int code = bits == 8 ? from[column] : column % 2 ? from[column / 2] >> 4 : from[column / 2] & 15;
      result += (scale * static_cast<float>(code) + bias) * values[block * kCodeBlock + i];
    });
  }
  return result;
}

}  // namespace torch_fused::TORCH_FUSED_TARGET
