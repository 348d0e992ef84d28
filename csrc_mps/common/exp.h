// exp in plain arithmetic, which the compiler vectorises; within an ulp or so.
#pragma once

#include <algorithm>
#include <cstdint>

#include "convert.h"
#include "simd.h"

namespace torch_fused {

// x = n * ln(2) + r with |r| <= ln(2) / 2: the nearest integer n falls out of the low bits of x / ln(2) + 1.5 * 2^23,
// and ln(2) in two parts keeps r exact. The result is made as p * 2^(n + bias) * 2^-bias, so that only 2^(n + bias) has
// to be a normal number.
template <int bias>
TORCH_FUSED_INLINE float exp_biased(float x) {
  const float shifted = x * 1.44269504f + 0x1.8p23f;
  const float n = shifted - 0x1.8p23f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  // The minimax polynomial of Cephes' expf.
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * (r * r) + r) + 1.0f;
  const auto power = bit_copy<float>((bit_copy<uint32_t>(shifted) << 23) + (uint32_t(127 + bias) << 23));
  return p * power * (bias > 0 ? 0x1p-64f : 0x1p64f);
}

template <int bias>
TORCH_FUSED_INLINE double exp_biased(double x) {
  const double shifted = x * 1.4426950408889634 + 0x1.8p52;
  const double n = shifted - 0x1.8p52;
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
  const auto power = bit_copy<double>((bit_copy<uint64_t>(shifted) << 52) + (uint64_t(1023 + bias) << 52));
  return p * power * (bias > 0 ? 0x1p-64 : 0x1p64);
}

// exp(x) of x <= 0, right below the normal range too; NaN is kept.
TORCH_FUSED_INLINE float exp_nonpositive(float x) {
  return exp_biased<64>(x < -104.0f ? -104.0f : x);
}
TORCH_FUSED_INLINE double exp_nonpositive(double x) {
  return exp_biased<64>(x < -746.0 ? -746.0 : x);
}

// 1 + exp(x) of any x; a NaN counts as some number. Below -43 nothing is left of the exponential, in float64 neither.
// The limits are put on the bits: of a comparison of floats g++ makes branches of the code that follows.
TORCH_FUSED_INLINE float one_plus_exp(float x) {
  const int32_t below_limit = std::min(bit_copy<int32_t>(x), bit_copy<int32_t>(89.0f));
  const uint32_t within = std::min(bit_copy<uint32_t>(below_limit), bit_copy<uint32_t>(-43.0f));
  return 1.0f + exp_biased<-64>(bit_copy<float>(within));
}
TORCH_FUSED_INLINE double one_plus_exp(double x) {
  x = x < -43.0 ? -43.0 : x;
  return 1.0 + exp_biased<-64>(x > 710.0 ? 710.0 : x);
}

}  // namespace torch_fused
