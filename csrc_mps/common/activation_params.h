// The activations of gated feed-forward layers, as host code and kernels name them, and what both compute alike.
#pragma once
#include "common/shared.h"

namespace torch_fused {

// Gelu by the normal distribution itself, and by tanh.
SHARED_CONSTANT uint32_t kSilu = 0, kGelu = 1, kGeluTanh = 2;

// erfc(z) * exp(z * z) of z >= 0, within 3e-7 of itself: t times a polynomial of t = 1 / (1 + z / 2). The coefficients
// have the least largest relative error over 0 <= z <= 13.5, beyond which exp(-z * z) is 0.
SHARED_INLINE float scaled_erfc(float z) {
  const float t = 1.0f / (1.0f + 0.5f * z);
  float p = -0.0593861192f;
  p = p * t + 0.286122352f;
  p = p * t - 0.490403235f;
  p = p * t + 0.281729907f;
  p = p * t - 0.0291463695f;
  p = p * t + 0.203751698f;
  p = p * t + 0.242835298f;
  p = p * t + 0.282412082f;
  p = p * t + 0.282084346f;
  return p * t;
}

// Constants as exact in double as in float, of floats: Metal has no literals of double.
template <typename Wide>
SHARED_INLINE Wide sqrt_of_8_over_pi() {
  return Wide(1.5957692f) + Wide(-4.534068e-08f);
}
template <typename Wide>
SHARED_INLINE Wide millionths(float count) {
  return Wide(count) / Wide(1e6f);
}

// gelu_tanh(g) = g * sigmoid(y): y of a g that `limit_gelu_tanh` has limited, and its slope.
template <typename Wide>
SHARED_INLINE Wide gelu_tanh_argument(Wide g) {
  return sqrt_of_8_over_pi<Wide>() * g * (Wide(1) + millionths<Wide>(44715) * g * g);
}
template <typename Wide>
SHARED_INLINE Wide gelu_tanh_argument_slope(Wide g) {
  return sqrt_of_8_over_pi<Wide>() * (Wide(1) + millionths<Wide>(134145) * g * g);
}

// Past 30 the sigmoid is 0 or 1 whatever g is, and the square of g may be infinite. NaN is kept.
template <typename Wide>
SHARED_INLINE Wide limit_gelu_tanh(Wide g) {
  return g > Wide(30) ? Wide(30) : g < Wide(-30) ? Wide(-30) : g;
}

}  // namespace torch_fused
