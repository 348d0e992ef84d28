// The activations of gated feed-forward layers in plain arithmetic, which the compiler vectorises.
#pragma once

#include <cmath>
#include <cstdint>

#include "activation_params.h"
#include "exp.h"
#include "simd.h"

namespace torch_fused {

// How much of the normal distribution lies below g.
TORCH_FUSED_INLINE float normal_below(float g) {
  const float tail = 0.5f * exp_nonpositive(-0.5f * g * g) * scaled_erfc(std::fabs(g) * 0.707106781f);
  return g < 0 ? tail : 1 - tail;
}
TORCH_FUSED_INLINE double normal_below(double g) {
  return 0.5 * std::erfc(-g * 0.7071067811865476);
}

template <class Wide>
TORCH_FUSED_INLINE Wide normal_density(Wide g) {
  return static_cast<Wide>(0.3989422804014327) * exp_nonpositive(static_cast<Wide>(-0.5) * g * g);
}

template <uint32_t activation, class Wide>
TORCH_FUSED_INLINE Wide activate(Wide g) {
  if constexpr (activation == kGelu) return g * normal_below(g);
  const Wide y = activation == kSilu ? g : gelu_tanh_argument(limit_gelu_tanh(g));
  return g / one_plus_exp(-y);
}

template <class Wide>
struct ValueAndSlope {
  Wide value, slope;
};

template <uint32_t activation, class Wide>
TORCH_FUSED_INLINE ValueAndSlope<Wide> activate_with_slope(Wide g) {
  if constexpr (activation == kGelu) {
    const Wide below = normal_below(g);
    return {g * below, below + g * normal_density(g)};
  }
  const Wide limited = activation == kSilu ? g : limit_gelu_tanh(g);
  const Wide y = activation == kSilu ? g : gelu_tanh_argument(limited);
  const Wide y_slope = activation == kSilu ? 1 : gelu_tanh_argument_slope(limited);
  const Wide sigmoid = 1 / one_plus_exp(-y);
  return {g * sigmoid, sigmoid * (1 + limited * y_slope * (1 - sigmoid))};
}

}  // namespace torch_fused
