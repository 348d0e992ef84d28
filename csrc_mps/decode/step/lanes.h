// Sixteen floats as one value. The compiler makes one, two or four registers of it, as the instruction set has them.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

#include "../../common/simd.h"

namespace torch_fused::TORCH_FUSED_TARGET {

constexpr int64_t kLanes = 16;

typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef float EightLanes __attribute__((vector_size(32)));
typedef float FourLanes __attribute__((vector_size(16)));
typedef uint32_t LaneBits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfLaneBits __attribute__((vector_size(2 * kLanes)));

// Results come back by reference: a vector that is returned has another ABI on each machine.
TORCH_FUSED_INLINE void load(const float* from, Lanes& to) {
  std::memcpy(&to, from, sizeof(to));
}

TORCH_FUSED_INLINE void load_bits(const void* from, LaneBits& to) {
#ifdef TORCH_FUSED_AVX512
  // One instruction, where g++ makes five of the conversion below. (Unmasked, g++ 12 warns about its own header.)
  to = (LaneBits)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(static_cast<const __m256i*>(from)));
  return;
#endif
  HalfLaneBits bits;
  std::memcpy(&bits, from, sizeof(bits));
  to = __builtin_convertvector(bits, LaneBits);
}

TORCH_FUSED_INLINE void load(const c10::BFloat16* from, Lanes& to) {
  LaneBits bits;
  load_bits(from, bits);
  bits <<= 16;
  std::memcpy(&to, &bits, sizeof(to));
}

TORCH_FUSED_INLINE void load(const c10::Half* from, Lanes& to) {
#ifdef TORCH_FUSED_AVX512
  to = _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(TORCH_FUSED_F16C)
  const auto* halves = reinterpret_cast<const __m128i*>(from);
  const __m256 low = _mm256_cvtph_ps(_mm_loadu_si128(halves)), high = _mm256_cvtph_ps(_mm_loadu_si128(halves + 1));
  to = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  LaneBits bits;
  load_bits(from, bits);
  const LaneBits magnitude = bits & 0x7fff;
  // As Wide<c10::Half>::widen.
  LaneBits result = magnitude << 13;
  std::memcpy(&to, &result, sizeof(to));
  to *= 0x1p112f;
  std::memcpy(&result, &to, sizeof(to));
  const LaneBits special = (LaneBits)(magnitude >= 0x7c00);  // infinity or NaN
  result |= (special & 0x7f800000) | (bits & 0x8000) << 16;
  std::memcpy(&to, &result, sizeof(to));
#endif
}

TORCH_FUSED_INLINE void store(const Lanes& from, float* to) {
  std::memcpy(to, &from, sizeof(from));
}

TORCH_FUSED_INLINE float sum_of(const Lanes& lanes) {
  EightLanes eight[2];
  std::memcpy(eight, &lanes, sizeof(lanes));
  eight[0] += eight[1];
  FourLanes four[2];
  std::memcpy(four, eight, sizeof(four));
  four[0] += four[1];
  return (four[0][0] + four[0][2]) + (four[0][1] + four[0][3]);
}

}  // namespace torch_fused::TORCH_FUSED_TARGET
