// The activations of gated feed-forward layers.
#pragma once
#include <metal_stdlib>
#include "common/activation_params.h"
using namespace metal;
using namespace torch_fused;

struct ValueAndSlope {
  float value, slope;
};

inline ValueAndSlope activate_with_slope(float g, uint activation) {
  if (activation == kGelu) {
    const float bell = exp(-0.5f * g * g), tail = 0.5f * bell * scaled_erfc(fabs(g) * 0.707106781f);
    const float below = g < 0.0f ? tail : 1.0f - tail;  // how much of the normal distribution lies below g
    return {g * below, below + 0.39894228f * g * bell};
  }
  const float limited = activation == kSilu ? g : limit_gelu_tanh(g);
  const float y = activation == kSilu ? g : gelu_tanh_argument(limited);
  const float y_slope = activation == kSilu ? 1.0f : gelu_tanh_argument_slope(limited);
  const float divisor = 1.0f + exp(-y), sigmoid = 1.0f / divisor;
  return {g / divisor, sigmoid * (1.0f + limited * y_slope * (1.0f - sigmoid))};
}

// The compiler leaves out what makes the slope.
inline float activate(float g, uint activation) {
  return activate_with_slope(g, activation).value;
}
