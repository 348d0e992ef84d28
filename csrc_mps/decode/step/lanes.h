// A few floats as one value: one AVX2 register, because g++ splits larger ones through memory, else sixteen, which
// the compiler puts into one or four registers.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../../common/simd.h"

namespace torch_fused::TORCH_FUSED_TARGET {

#if defined(TORCH_FUSED_AVX2) && !defined(TORCH_FUSED_AVX512)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 16;
#endif

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
#if defined(TORCH_FUSED_AVX512)
  // One instruction, where g++ makes five of the conversion below. (Unmasked, g++ 12 warns about its own header.)
  to = (LaneBits)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(static_cast<const __m256i*>(from)));
#elif defined(TORCH_FUSED_AVX2)
  to = (LaneBits)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
#else
  HalfLaneBits bits;
  std::memcpy(&bits, from, sizeof(bits));
  to = __builtin_convertvector(bits, LaneBits);
#endif
}

TORCH_FUSED_INLINE void load(const c10::BFloat16* from, Lanes& to) {
  LaneBits bits;
  load_bits(from, bits);
  bits <<= 16;
  std::memcpy(&to, &bits, sizeof(to));
}

TORCH_FUSED_INLINE void load(const c10::Half* from, Lanes& to) {
#if defined(TORCH_FUSED_AVX512)
  to = _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(TORCH_FUSED_AVX2)
  to = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
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

template <class Vector>
TORCH_FUSED_INLINE float sum_of(const Vector& lanes) {
  if constexpr (sizeof(Vector) == sizeof(FourLanes)) {
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
  } else {
    using Half = std::conditional_t<sizeof(Vector) == 2 * sizeof(EightLanes), EightLanes, FourLanes>;
    Half halves[2];
    std::memcpy(halves, &lanes, sizeof(lanes));
    halves[0] += halves[1];
    return sum_of(halves[0]);
  }
}

}  // namespace torch_fused::TORCH_FUSED_TARGET
