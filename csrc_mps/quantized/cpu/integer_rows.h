// Products of a packed row with vectors of int8: each block's products are summed as integers.
#pragma once

#include "float_rows.h"
#include "packed.h"

namespace torch_fused::TORCH_FUSED_TARGET {

// The sums of a block's products, spread over a few lanes.
#if defined(TORCH_FUSED_AVX2)
constexpr int64_t kDotLanes = 8;
#else
constexpr int64_t kDotLanes = 4;
#endif
typedef float Dots __attribute__((vector_size(4 * kDotLanes)));
typedef int32_t IntegerDots __attribute__((vector_size(4 * kDotLanes)));

// A block's codes, as the vectors are laid out: of four bits as they are; of eight less 128, so that they are signed.
struct BlockCodes {
#if defined(TORCH_FUSED_AVX2)
  __m256i bytes;
#elif defined(__ARM_NEON)
  int8x16_t bytes[2];
#else
  int8_t bytes[kCodeBlock];
#endif
};

template <int bits>
constexpr float kCentre = bits == 8 ? 128 : 0;

template <int bits>
TORCH_FUSED_INLINE void load_block(const uint8_t* from, BlockCodes& to) {
#if defined(TORCH_FUSED_AVX2)
  if (bits == 4) {
    const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m256i spread = _mm256_inserti128_si256(_mm256_castsi128_si256(both), _mm_srli_epi16(both, 4), 1);
    to.bytes = _mm256_and_si256(spread, _mm256_set1_epi8(15));
  } else {
    to.bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
#ifndef TORCH_FUSED_VNNI
    to.bytes = _mm256_xor_si256(to.bytes, _mm256_set1_epi8(-128));
#endif
  }
#elif defined(__ARM_NEON)
  const uint8x16_t first = vld1q_u8(from);
  if (bits == 4) {
    to.bytes[0] = vreinterpretq_s8_u8(vandq_u8(first, vdupq_n_u8(15)));
    to.bytes[1] = vreinterpretq_s8_u8(vshrq_n_u8(first, 4));
  } else {
    to.bytes[0] = vreinterpretq_s8_u8(veorq_u8(first, vdupq_n_u8(128)));
    to.bytes[1] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(from + 16), vdupq_n_u8(128)));
  }
#else
  for (int64_t i = 0; i < kCodeBlock; ++i) {
    const int code = bits == 8 ? from[i] - 128 : i < 16 ? from[i] & 15 : from[i - 16] >> 4;
    to.bytes[i] = static_cast<int8_t>(code);
  }
#endif
}

template <int bits>
TORCH_FUSED_INLINE void dot(const BlockCodes& codes, const int8_t* x, IntegerDots& to) {
#if defined(TORCH_FUSED_AVX2)
  const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
#ifdef TORCH_FUSED_VNNI
  // The first operand is unsigned, so that codes of eight bits need no centre.
  to = (IntegerDots)_mm256_dpbusd_epi32(_mm256_setzero_si256(), codes.bytes, values);
#else
  // Pairs are summed in 16 bits: 2 * 15 * 127, or 2 * 128 * 127, fit. The first operand is unsigned: a sign moves to
  // the other.
  const __m256i pairs = bits == 4 ? _mm256_maddubs_epi16(codes.bytes, values)
                                  : _mm256_maddubs_epi16(_mm256_abs_epi8(codes.bytes),
                                                         _mm256_sign_epi8(values, codes.bytes));
  to = (IntegerDots)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
#elif defined(__ARM_NEON)
  const int8x16_t values[2] = {vld1q_s8(x), vld1q_s8(x + 16)};
  int32x4_t sum = vdupq_n_s32(0);
  for (int i = 0; i < 2; ++i) {
#ifdef __ARM_FEATURE_DOTPROD
    sum = vdotq_s32(sum, codes.bytes[i], values[i]);
#else
    sum = vpadalq_s16(sum, vmull_s8(vget_low_s8(codes.bytes[i]), vget_low_s8(values[i])));
    sum = vpadalq_s16(sum, vmull_s8(vget_high_s8(codes.bytes[i]), vget_high_s8(values[i])));
#endif
  }
  to = (IntegerDots)sum;
#else
  int32_t sum = 0;
  for (int64_t i = 0; i < kCodeBlock; ++i) sum += codes.bytes[i] * x[i];
  to = IntegerDots{sum, 0, 0, 0};
#endif
}

#ifdef TORCH_FUSED_VNNI
constexpr bool kCentred = false;
#else
constexpr bool kCentred = true;
#endif

TORCH_FUSED_INLINE float sum_of_dots(const Dots& dots) {
  Lanes all = {};
  std::memcpy(&all, &dots, sizeof(dots));
  return sum_of(all);
}

// A block's scale is its largest magnitude over 127. A value that is not finite makes the scale, and so every result,
// NaN.
TORCH_FUSED_INLINE void arrange_integers(const float* x, int64_t cols, int64_t bits, int8_t* codes, float* scales,
                                         float* sums) {
  constexpr float kRound = 0x1.8p23f;  // added to a small number, it leaves its nearest integer in the low bits
  for (int64_t block = 0; block < cols / kCodeBlock; ++block, x += kCodeBlock, codes += kCodeBlock) {
    float largest = 0, nothing = 0;
    for (int64_t i = 0; i < kCodeBlock; ++i) {
      largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
      nothing += x[i] * 0;
    }
    const float to_code = largest > 0x1p-119f ? 127 / largest : 0;  // else infinite
    int32_t whole[kCodeBlock], sum = 0;
    for (int64_t i = 0; i < kCodeBlock; ++i) {
      const float code = nothing == 0 ? x[i] * to_code : 0;
      whole[i] = bit_copy<int32_t>(code + kRound) - bit_copy<int32_t>(kRound);
      sum += whole[i];
    }
    arranged(bits, [&](int64_t column, int64_t i) __attribute__((always_inline)) {
      codes[i] = static_cast<int8_t>(whole[column]);
    });
    scales[block] = largest / 127 + nothing;
    sums[block] = scales[block] * static_cast<float>(sum);
  }
}

// Products with C vectors from `first` on. The biases meet the sums of the codes, not of the values: what rounding to
// int8 took then counts with the weights, which are about zero, and not with their codes, which are all positive.
template <int bits, int C, class S>
TORCH_FUSED_INLINE void packed_products(const PackedRow<S>& row, const IntegerVectors& x, int64_t first,
                                        float* results) {
  const int64_t blocks = row.groups * row.blocks, cols = blocks * kCodeBlock;
  const int8_t* values = x.codes + first * cols;
  const float* scales = x.scales + first * blocks;
  const float* sums = x.sums + first * blocks;
  const uint8_t* from = row.codes;
  Dots totals[C] = {};
  float shifts[C] = {};
  for (int64_t group = 0; group < row.groups; ++group) {
    Dots dots[C] = {};
    float of_group[C] = {};
    for (int64_t block = 0; block < row.blocks; ++block) {
      BlockCodes codes;
      load_block<bits>(from, codes);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        IntegerDots whole;
        dot<bits>(codes, values + c * cols, whole);
        dots[c] += scales[c * blocks] * __builtin_convertvector(whole, Dots);
        of_group[c] += sums[c * blocks];
      }
      from += kCodeBlock * bits / 8;
      values += kCodeBlock;
      ++scales;
      ++sums;
    }
    const float scale = widen_one(row.scales[group]);
    const float bias = widen_one(row.biases[group]) + (kCentred ? kCentre<bits> * scale : 0);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      totals[c] += scale * dots[c];
      shifts[c] += bias * of_group[c];
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) results[c] = sum_of_dots(totals[c]) + shifts[c];
}

}  // namespace torch_fused::TORCH_FUSED_TARGET
