// The loss of a row of logits, and its gradient, from sums over the classes.
#pragma once
#include <metal_stdlib>
#include "common/online.metal.h"
using namespace metal;

// `total` is the sum of the logits.
inline float loss_of_row(Online exps, float of_target, float total, uint classes, float smoothing, float z_loss) {
  const float log_sum = log(exps.sum);
  const float lse = exps.largest + log_sum;
  float loss = log_sum + (1.0f - smoothing) * (exps.largest - of_target);
  if (smoothing > 0.0f) loss += smoothing * (exps.largest - total / float(classes));
  if (z_loss != 0.0f) loss += z_loss * lse * lse;
  return loss;
}

// The gradient of a row's loss times a scale, logit by logit.
struct RowGradient {
  float largest;
  float factor;
  float uniform;
  float of_target;

  static RowGradient of(Online exps, float scale, uint classes, float smoothing, float z_loss) {
    const float lse = exps.largest + log(exps.sum);
    const float factor = scale * (z_loss != 0.0f ? 1.0f + 2.0f * z_loss * lse : 1.0f) / exps.sum;
    return {exps.largest, factor, scale * smoothing / float(classes), scale * (1.0f - smoothing)};
  }

  float at(float x, bool is_target) const {
    return exp(x - largest) * factor - uniform - (is_target ? of_target : 0.0f);
  }
};
