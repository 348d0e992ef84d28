// Products of a packed row with vectors of int8: each block's products are summed as integers.
#pragma once

#include "float_rows.h"
#include "packed.h"

namespace torch_fused::TORCH_FUSED_TARGET {

// Sums of products, spread over a few lanes.
typedef float Dots __attribute__((vector_size(32)));
typedef int32_t IntegerDots __attribute__((vector_size(32)));

// Codes of eight bits are signed, less 128, where the machine multiplies signed bytes only.
#ifdef TORCH_FUSED_VNNI
constexpr bool kCentred = false;
#else
constexpr bool kCentred = true;
#endif
template <int bits>
constexpr float kCentre = bits == 8 && kCentred ? 128 : 0;

// A unit of codes of four bits: its even columns, then its odd ones. Or a block of codes of eight.
struct Codes {
#if defined(TORCH_FUSED_AVX2)
  __m256i bytes[2];
#elif defined(__ARM_NEON)
  int8x16_t bytes[4];
#else
  int8_t bytes[kCodeUnit];
#endif
};

// `half`: the unit has one block.
TORCH_FUSED_INLINE void load_unit(const uint8_t* from, bool half, Codes& to) {
#if defined(TORCH_FUSED_AVX2)
  const auto* both = reinterpret_cast<const __m128i*>(from);
  const __m256i codes = half ? _mm256_inserti128_si256(_mm256_setzero_si256(), _mm_loadu_si128(both), 0)
                             : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  to.bytes[0] = _mm256_and_si256(codes, _mm256_set1_epi8(15));
  to.bytes[1] = _mm256_and_si256(_mm256_srli_epi16(codes, 4), _mm256_set1_epi8(15));
#elif defined(__ARM_NEON)
  for (int i = 0; i < 2; ++i) {
    const uint8x16_t codes = i == 1 && half ? vdupq_n_u8(0) : vld1q_u8(from + 16 * i);
    to.bytes[i] = vreinterpretq_s8_u8(vandq_u8(codes, vdupq_n_u8(15)));
    to.bytes[2 + i] = vreinterpretq_s8_u8(vshrq_n_u8(codes, 4));
  }
#else
  for (int64_t i = 0; i < kCodeBlock; ++i) {
    const uint8_t code = i >= 16 && half ? 0 : from[i];
    to.bytes[i] = static_cast<int8_t>(code & 15);
    to.bytes[kCodeBlock + i] = static_cast<int8_t>(code >> 4);
  }
#endif
}

TORCH_FUSED_INLINE void load_block(const uint8_t* from, Codes& to) {
#if defined(TORCH_FUSED_AVX2)
  to.bytes[0] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  if (kCentred) to.bytes[0] = _mm256_xor_si256(to.bytes[0], _mm256_set1_epi8(-128));
#elif defined(__ARM_NEON)
  for (int i = 0; i < 2; ++i) to.bytes[i] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(from + 16 * i), vdupq_n_u8(128)));
#else
  for (int64_t i = 0; i < kCodeBlock; ++i) to.bytes[i] = static_cast<int8_t>(from[i] - 128);
#endif
}

#if defined(__ARM_NEON)
TORCH_FUSED_INLINE int32x4_t add_dot(int32x4_t sum, int8x16_t a, int8x16_t b) {
#ifdef __ARM_FEATURE_DOTPROD
  return vdotq_s32(sum, a, b);
#else
  // Sums of two products fit in 16 bits: 2 * 128 * 127.
  return vpadalq_s16(sum,
                     vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_s8(vget_high_s8(a), vget_high_s8(b))));
#endif
}
#endif

// The dot product of a unit: of columns 8 * i to 8 * i + 7 in lane i.
TORCH_FUSED_INLINE void dot_unit(const Codes& codes, const int8_t* x, IntegerDots& to) {
#if defined(TORCH_FUSED_AVX2)
  const auto* values = reinterpret_cast<const __m256i*>(x);
  const __m256i even = _mm256_loadu_si256(values), odd = _mm256_loadu_si256(values + 1);
#ifdef TORCH_FUSED_VNNI
  to = (IntegerDots)_mm256_dpbusd_epi32(_mm256_dpbusd_epi32(_mm256_setzero_si256(), codes.bytes[0], even),
                                        codes.bytes[1], odd);
#else
  // Sums of four products fit in 16 bits: 4 * 15 * 127.
  const __m256i pairs =
      _mm256_add_epi16(_mm256_maddubs_epi16(codes.bytes[0], even), _mm256_maddubs_epi16(codes.bytes[1], odd));
  to = (IntegerDots)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
#elif defined(__ARM_NEON)
  int32x4_t sums[2];
  for (int i = 0; i < 2; ++i) {
    sums[i] = add_dot(vdupq_n_s32(0), codes.bytes[i], vld1q_s8(x + 16 * i));
    sums[i] = add_dot(sums[i], codes.bytes[2 + i], vld1q_s8(x + kCodeBlock + 16 * i));
  }
  std::memcpy(&to, sums, sizeof(to));
#else
  to = IntegerDots{};
  for (int64_t i = 0; i < kCodeUnit; ++i) to[i % kCodeBlock / 4] += codes.bytes[i] * x[i];
#endif
}

// Of a block of eight bits: of columns 4 * i to 4 * i + 3 in lane i.
TORCH_FUSED_INLINE void dot_block(const Codes& codes, const int8_t* x, IntegerDots& to) {
#if defined(TORCH_FUSED_AVX2)
  const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
#ifdef TORCH_FUSED_VNNI
  to = (IntegerDots)_mm256_dpbusd_epi32(_mm256_setzero_si256(), codes.bytes[0], values);
#else
  // The first operand is unsigned: its sign moves to the other. Sums of two products fit in 16 bits: 2 * 128 * 127.
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes.bytes[0]), _mm256_sign_epi8(values, codes.bytes[0]));
  to = (IntegerDots)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
#elif defined(__ARM_NEON)
  int32x4_t sums[2];
  for (int i = 0; i < 2; ++i) sums[i] = add_dot(vdupq_n_s32(0), codes.bytes[i], vld1q_s8(x + 16 * i));
  std::memcpy(&to, sums, sizeof(to));
#else
  to = IntegerDots{};
  for (int64_t i = 0; i < kCodeBlock; ++i) to[i / 4] += codes.bytes[i] * x[i];
#endif
}

// Eight columns share a scale, their largest magnitude over 127: a large value costs its neighbours no more digits than
// that. A value that is not finite makes the scale, and so every result, NaN.
TORCH_FUSED_INLINE void arrange_integers(const PackedMatrix& m, const float* x, int8_t* codes, float* scales,
                                         float* sums) {
  constexpr float kRound = 0x1.8p23f;  // added to a small number, it leaves its nearest integer in the low bits
  const int64_t lanes = m.scale_lanes() / (kCodeUnit / kScaled);
  std::fill(sums, sums + m.sums, 0.0f);
  for (int64_t column = 0; column < m.units * kCodeUnit; column += kScaled, x += kScaled) {
    float largest = 0, nothing = 0;
    const bool there = column < m.cols;
    for (int64_t i = 0; i < kScaled && there; ++i) {
      largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
      nothing += x[i] * 0;
    }
    const float to_code = largest > 0x1p-119f && nothing == 0 ? 127 / largest : 0;  // else infinite
    int32_t whole[kScaled] = {}, sum = 0;
    for (int64_t i = 0; i < kScaled && to_code > 0; ++i) {
      whole[i] = bit_copy<int32_t>(x[i] * to_code + kRound) - bit_copy<int32_t>(kRound);
      sum += whole[i];
    }
    const int64_t unit = column / kCodeUnit * kCodeUnit, in_unit = column % kCodeUnit;
    for (int64_t i = 0; i < kScaled; ++i) {
      codes[unit + (m.bits == 4 ? i % 2 * kCodeBlock + (in_unit + i) / 2 : in_unit + i)] =
          static_cast<int8_t>(whole[i]);
    }
    const float scale = largest / 127 + nothing;
    std::fill_n(scales + column / kScaled * lanes, lanes, scale);
    if (there) sums[column / m.group_size] += scale * static_cast<float>(sum);
  }
}

// Adds the products of R rows with C vectors, of codes of four bits. Where a group is a block, each half of the lanes
// has a scale of its own.
template <int blocks, int R, int C>
TORCH_FUSED_INLINE void add_units(const PackedMatrix& m, const PackedGroups (&rows)[R], const int8_t* values,
                                  const float* scales, Dots (&totals)[R][C]) {
  constexpr int kUnits = blocks < 2 ? 1 : blocks / 2;  // at once
  const int64_t count = rows[0].count * blocks;
  for (int64_t block = 0; block < count; block += 2 * kUnits) {
    Dots dots[R][C] = {};
#pragma GCC unroll 2
    for (int unit = 0; unit < kUnits; ++unit) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        Codes codes;
        const uint8_t* from = rows[r].codes + (block + 2 * unit) * (kCodeBlock / 2);
        fetch_ahead<R>(from);
        load_unit(from, block + 1 == count, codes);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
          IntegerDots whole;
          Dots scale;
          dot_unit(codes, values + c * m.units * kCodeUnit, whole);
          std::memcpy(&scale, scales + c * m.units * m.scale_lanes(), sizeof(scale));
          dots[r][c] += scale * __builtin_convertvector(whole, Dots);
        }
      }
      values += kCodeUnit;
      scales += 8;
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      Dots scale;
      if constexpr (blocks == 1) {
        const float first = rows[r].scales[block], second = block + 1 < count ? rows[r].scales[block + 1] : 0;
        scale = Dots{first, first, first, first, second, second, second, second};
      } else {
        scale = rows[r].scales[block / blocks] - Dots{};  // in every lane
      }
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) totals[r][c] += scale * dots[r][c];
    }
  }
}

// The same of codes of eight bits.
template <int blocks, int R, int C>
TORCH_FUSED_INLINE void add_blocks(const PackedMatrix& m, const PackedGroups (&rows)[R], const int8_t* values,
                                   const float* scales, Dots (&totals)[R][C]) {
  for (int64_t group = 0; group < rows[0].count; ++group) {
    Dots dots[R][C] = {};
#pragma GCC unroll 4
    for (int block = 0; block < blocks; ++block) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        Codes codes;
        const uint8_t* from = rows[r].codes + (group * blocks + block) * kCodeBlock;
        fetch_ahead<R>(from);
        load_block(from, codes);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
          IntegerDots whole;
          Dots scale;
          dot_block(codes, values + c * m.units * kCodeUnit, whole);
          std::memcpy(&scale, scales + c * m.units * m.scale_lanes(), sizeof(scale));
          dots[r][c] += scale * __builtin_convertvector(whole, Dots);
        }
      }
      values += kCodeBlock;
      scales += 8;
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) totals[r][c] += rows[r].scales[group] * dots[r][c];
    }
  }
}

// The biases meet the sums of the codes, not of the values: what rounding to int8 took then counts with the weights,
// which are about zero, and not with their codes, which are all positive.
template <int bits, int blocks, int C, int R>
TORCH_FUSED_INLINE void add_products(const PackedMatrix& m, const PackedGroups (&rows)[R], const IntegerVectors& x,
                                     int64_t first, Products* results) {
  const PackedGroups& groups = rows[0];
  const int8_t* values = x.codes + first * m.units * kCodeUnit + groups.first * m.group_size;
  const float* scales = x.scales + first * m.units * m.scale_lanes() + groups.first * blocks * m.scale_lanes() / 2;
  Dots totals[R][C] = {};
  if constexpr (bits == 4) {
    add_units<blocks>(m, rows, values, scales, totals);
  } else {
    add_blocks<blocks>(m, rows, values, scales, totals);
  }
  add_totals(m, rows, totals, x.sums, first, results);
}

}  // namespace torch_fused::TORCH_FUSED_TARGET
