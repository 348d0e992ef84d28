// exp in plain arithmetic, which the compiler vectorises; within an ulp or so, exact at 0, infinities and NaN.
#pragma once

#include <cstdint>

#include "convert.h"
#include "simd.h"

namespace torch_fused {

// x = n * ln(2) + r with |r| <= ln(2) / 2: the nearest integer n falls out of the low bits of x / ln(2) + 1.5 * 2^23,
// and ln(2) in two parts keeps r exact. 2^n is applied in two halves, so that results below the normal range come out
// right.
TORCH_FUSED_INLINE float exp_of(float x) {
  x = x < -104.0f ? -104.0f : x;  // 0 from here down
  x = x > 89.0f ? 89.0f : x;      // infinity from here up
  const float shifted = x * 1.44269504f + 0x1.8p23f;
  const float n = shifted - 0x1.8p23f;
  const int32_t exponent = bit_copy<int32_t>(shifted) - bit_copy<int32_t>(0x1.8p23f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  // The minimax polynomial of Cephes' expf.
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * (r * r) + r) + 1.0f;
  const int32_t half = exponent >> 1;
  return p * bit_copy<float>((half + 127) << 23) * bit_copy<float>((exponent - half + 127) << 23);
}

TORCH_FUSED_INLINE double exp_of(double x) {
  x = x < -746.0 ? -746.0 : x;
  x = x > 710.0 ? 710.0 : x;
  const double shifted = x * 1.4426950408889634 + 0x1.8p52;
  const double n = shifted - 0x1.8p52;
  const int64_t exponent = bit_copy<int64_t>(shifted) - bit_copy<int64_t>(0x1.8p52);
  const double r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
  double p = 1.0 / 6227020800.0;  // Taylor's series to r^13
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = (p * (r * r) + r) + 1.0;
  // Half of the exponent, rounded down, without an arithmetic 64-bit shift, which AVX2 lacks.
  const int64_t half = static_cast<int64_t>(static_cast<uint64_t>(exponent + 2048) >> 1) - 1024;
  return p * bit_copy<double>((half + 1023) << 52) * bit_copy<double>((exponent - half + 1023) << 52);
}

}  // namespace torch_fused
