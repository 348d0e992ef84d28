// Products of packed rows with vectors of int8: a lane sums those of a few columns as integers.
#pragma once

#include "float_rows.h"
#include "packed.h"

namespace torch_fused::TORCH_FUSED_TARGET {

// Codes of eight bits are signed, less 128, where the machine multiplies signed bytes only.
#ifdef TORCH_FUSED_VNNI
constexpr bool kCentred = false;
#else
constexpr bool kCentred = true;
#endif
template <int bits>
constexpr float kCentre = bits == 8 && kCentred ? 128 : 0;

// A unit is a register of codes. Each lane of the products has eight columns of four bits, or four of eight.
constexpr int64_t kUnitBytes = 4 * kWide;
template <int bits>
constexpr int64_t kLaneCodes = 32 / bits;

#if defined(TORCH_FUSED_VNNI)
typedef __m512i Bytes;
#elif defined(TORCH_FUSED_AVX2)
typedef __m256i Bytes;
#elif defined(__ARM_NEON)
typedef int8x16_t Bytes;
#else
struct Bytes {
  int8_t each[kUnitBytes];
};
#endif

// Of four bits: the unit's even columns, then its odd ones.
template <int bits>
constexpr int kParts = bits == 4 ? 2 : 1;
template <int bits>
struct Codes {
  Bytes bytes[kParts<bits>];
};

// The unit has `count` bytes; zeros come after them.
template <int bits>
TORCH_FUSED_INLINE void load_unit(const uint8_t* from, int64_t count, Codes<bits>& to) {
#if defined(TORCH_FUSED_VNNI)
  const auto there = count < kUnitBytes ? static_cast<__mmask16>((1 << count / 4) - 1) : static_cast<__mmask16>(-1);
  to.bytes[0] = _mm512_maskz_loadu_epi32(there, from);
  if constexpr (bits == 4) {
    to.bytes[1] = _mm512_and_si512(_mm512_srli_epi16(to.bytes[0], 4), _mm512_set1_epi8(15));
    to.bytes[0] = _mm512_and_si512(to.bytes[0], _mm512_set1_epi8(15));
  }
#elif defined(TORCH_FUSED_AVX2)
  const auto* first = reinterpret_cast<const __m128i*>(from);
  to.bytes[0] = count < kUnitBytes ? _mm256_inserti128_si256(_mm256_setzero_si256(), _mm_loadu_si128(first), 0)
                                   : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  if constexpr (bits == 4) {
    to.bytes[1] = _mm256_and_si256(_mm256_srli_epi16(to.bytes[0], 4), _mm256_set1_epi8(15));
    to.bytes[0] = _mm256_and_si256(to.bytes[0], _mm256_set1_epi8(15));
  } else {
    to.bytes[0] = _mm256_xor_si256(to.bytes[0], _mm256_set1_epi8(-128));
  }
#elif defined(__ARM_NEON)
  (void)count;  // all of them: a block of codes is a register or two
  const uint8x16_t codes = vld1q_u8(from);
  if constexpr (bits == 4) {
    to.bytes[0] = vreinterpretq_s8_u8(vandq_u8(codes, vdupq_n_u8(15)));
    to.bytes[1] = vreinterpretq_s8_u8(vshrq_n_u8(codes, 4));
  } else {
    to.bytes[0] = vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(128)));
  }
#else
  (void)count;  // as above
  for (int64_t i = 0; i < kUnitBytes; ++i) {
    if constexpr (bits == 4) to.bytes[1].each[i] = static_cast<int8_t>(from[i] >> 4);
    to.bytes[0].each[i] = static_cast<int8_t>(bits == 4 ? from[i] & 15 : from[i] - 128);
  }
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

// Each lane's sum of products with a unit of a vector.
template <int bits>
TORCH_FUSED_INLINE void dot_unit(const Codes<bits>& codes, const int8_t* x, WideInts& to) {
#if defined(TORCH_FUSED_VNNI)
  __m512i sum = _mm512_setzero_si512();
  for (int i = 0; i < kParts<bits>; ++i)
    sum = _mm512_dpbusd_epi32(sum, codes.bytes[i], _mm512_loadu_si512(x + i * kUnitBytes));
  to = (WideInts)sum;
#elif defined(TORCH_FUSED_AVX2)
  const auto* values = reinterpret_cast<const __m256i*>(x);
  const __m256i first = _mm256_loadu_si256(values);
  __m256i pairs;
  if constexpr (bits == 4) {
    // Sums of four products fit in 16 bits: 4 * 15 * 127.
    pairs = _mm256_add_epi16(_mm256_maddubs_epi16(codes.bytes[0], first),
                             _mm256_maddubs_epi16(codes.bytes[1], _mm256_loadu_si256(values + 1)));
  } else {
    // The first operand is unsigned: its sign moves to the other. Sums of two products fit in 16 bits: 2 * 128 * 127.
    pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes.bytes[0]), _mm256_sign_epi8(first, codes.bytes[0]));
  }
  to = (WideInts)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(__ARM_NEON)
  int32x4_t sum = vdupq_n_s32(0);
  for (int i = 0; i < kParts<bits>; ++i) sum = add_dot(sum, codes.bytes[i], vld1q_s8(x + i * kUnitBytes));
  to = (WideInts)sum;
#else
  to = WideInts{};
  for (int part = 0; part < kParts<bits>; ++part) {
    for (int64_t i = 0; i < kUnitBytes; ++i) to[i / 4] += codes.bytes[part].each[i] * x[part * kUnitBytes + i];
  }
#endif
}

// The scale of each lane of a unit, of kLanes groups of `lanes` lanes each.
template <int lanes>
TORCH_FUSED_INLINE void spread_scales(const float (&scales)[kLanes], int64_t unit, Wide& to) {
#if defined(TORCH_FUSED_AVX2)
  Lanes all;
  load(scales, all);
  LaneBits index;
  std::memcpy(&index, kIndex, sizeof(index));
  index = (index + static_cast<uint32_t>(unit * kWide)) / lanes;
#if defined(TORCH_FUSED_AVX512)
  to = _mm512_maskz_permutexvar_ps(0xffff, (__m512i)index, all);
#else
  to = _mm256_permutevar8x32_ps(all, (__m256i)index);
#endif
#else
  to = scales[unit * kWide / lanes] - Wide{};  // in every lane
#endif
}

// Eight columns share a scale, their largest magnitude over 127: a large value costs its neighbours no more digits than
// that. A value that is not finite makes its group's sum, and so every result, NaN.
template <int bits>
TORCH_FUSED_INLINE void arrange_integers(const PackedMatrix& m, const float* x, int8_t* codes, float* scales,
                                         float* sums) {
  typedef uint32_t EightBits __attribute__((vector_size(32)));
  typedef uint64_t Pairs __attribute__((vector_size(32)));
  constexpr float kRound = 0x1.8p23f;     // added to a small number, it leaves its nearest integer in the low bits
  constexpr float kSmallest = 0x1p-119f;  // 127 over it is finite
  constexpr int64_t lanes = kScaled / kLaneCodes<bits>, in_unit = kLaneCodes<bits> * kWide;
  std::fill(sums + m.groups, sums + m.sums, 0.0f);
  std::fill(codes + m.cols / in_unit * in_unit, codes + m.padded, int8_t{0});
  std::fill(scales + m.cols / kLaneCodes<bits>, scales + m.vector_scales(), 0.0f);
  for (int64_t column = 0, group = 0; group < m.groups; ++group) {
    EightLanes sum = {}, values;
    for (const int64_t end = column + m.group_size; column < end; column += kScaled) {
      FourLanes halves[2];
      std::memcpy(&values, x + column, sizeof(values));
      const EightBits magnitudes = (EightBits)values & 0x7fffffff;
      std::memcpy(halves, &magnitudes, sizeof(halves));
      halves[0] = halves[0] > halves[1] ? halves[0] : halves[1];
      const float even = std::max(halves[0][0], halves[0][2]), odd = std::max(halves[0][1], halves[0][3]);
      const float largest = std::max(kSmallest, std::max(even, odd)), scale = largest * (1 / 127.0f);
      std::fill_n(scales + column / kScaled * lanes, lanes, scale);
      values = values * (127 / largest) + kRound;
      sum += scale * (values - kRound);

      // The low bytes side by side: of four bits those of even columns, then those of odd ones.
      Pairs pairs = (Pairs)values & 0x000000ff000000ff;
      pairs = bits == 4 ? pairs << Pairs{0, 8, 16, 24} : ((pairs | pairs >> 24) & 0xffff) << Pairs{0, 16, 32, 48};
      const uint64_t bytes = (pairs[0] | pairs[2]) | (pairs[1] | pairs[3]);
      const int64_t at = column & (in_unit - 1);
      int8_t* unit = codes + column - at;
      if constexpr (bits == 4) {
        const auto first = static_cast<uint32_t>(bytes), second = static_cast<uint32_t>(bytes >> 32);
        std::memcpy(unit + at / 2, &first, sizeof(first));
        std::memcpy(unit + kUnitBytes + at / 2, &second, sizeof(second));
      } else {
        std::memcpy(unit + at, &bytes, sizeof(bytes));
      }
    }
    sums[group] = sum_of(sum);
  }
}

// Products of R rows with C vectors from `first` on. The biases meet the sums of the codes, not of the values: what
// rounding to int8 took then counts with the weights, which are about zero, and not with their codes, which are all
// positive.
template <int bits, int group_size, int R, int C>
TORCH_FUSED_INLINE void integer_products(const PackedMatrix& m, const IntegerVectors& x, int64_t row, int64_t first,
                                         float* results, int64_t n) {
  constexpr int lanes = group_size / kLaneCodes<bits>;          // of a group
  constexpr int kTogether = lanes < kWide ? 1 : lanes / kWide;  // units of a group
  const auto* codes = reinterpret_cast<const uint8_t*>(m.weight + row * m.stride);
  const uint8_t* line = codes;
  int64_t left = m.cols * bits / 8;
  const int8_t* values = x.codes + first * m.padded;
  const float* scales = x.scales + first * m.padded / kLaneCodes<bits>;
  Wide totals[R][C] = {};
  for (int64_t group = 0; group < m.groups; group += kLanes) {
    const int64_t groups = std::min(m.groups - group, kLanes);
    float group_scales[R][kLanes];
    with_format(m.format, m.scales, [&](const auto* all) __attribute__((always_inline)) {
      const auto* biases = static_cast<decltype(all)>(m.biases);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const bool beyond = m.has_memory(row + r, group + kLanes);
        Lanes scale, bias, sum;
        load_first(all + (row + r) * m.scales_stride + group, groups, beyond, scale);
        store(scale, group_scales[r]);
        load_first(biases + (row + r) * m.biases_stride + group, groups, beyond, bias);
        if constexpr (kCentre<bits> != 0) bias += kCentre<bits> * scale;
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
          load(x.sums + (first + c) * m.sums + group, sum);
          add_lanes(bias * sum, totals[r][c]);
        }
      }
    });
    for (int64_t unit = 0; unit * kWide < groups * lanes; unit += kTogether) {
      Wide dots[R][C];
#pragma GCC unroll 8
      for (int i = 0; i < kTogether; ++i) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const uint8_t* from = codes + r * m.stride * 4;
          Codes<bits> units;
          if ((unit + i) * kUnitBytes % 64 == 0) fetch_ahead<R>(line);
          load_unit(from, left, units);
#pragma GCC unroll 8
          for (int c = 0; c < C; ++c) {
            WideInts whole;
            Wide scale;
            dot_unit(units, values + c * m.padded, whole);
            load_wide(scales + c * m.padded / kLaneCodes<bits>, scale);
            scale *= __builtin_convertvector(whole, Wide);
            dots[r][c] = i == 0 ? scale : dots[r][c] + scale;
          }
        }
        codes += kUnitBytes;
        left -= kUnitBytes;
        values += kWide * kLaneCodes<bits>;
        scales += kWide;
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        Wide scale;
        spread_scales<lanes>(group_scales[r], unit, scale);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) totals[r][c] += scale * dots[r][c];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) results[(first + c) * n + r] = sum_of(totals[r][c]);
  }
}

}  // namespace torch_fused::TORCH_FUSED_TARGET
