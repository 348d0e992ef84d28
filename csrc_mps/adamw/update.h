// AdamW's update of one element, https://arxiv.org/abs/1711.05101, in the order of operations of torch's fused AdamW on
// the CPU, so that the bits are equal; with AMSGrad, https://openreview.net/forum?id=ryQu7f-RZ, if asked for.
#pragma once
#include "common/shared.h"

namespace torch_fused {

// What the update of one tensor multiplies and adds. F is float, or double on the CPU.
template <typename F>
struct AdamwScalars {
  F bias_correction2;    // sqrt(1 - beta2^step)
  F negative_step_size;  // -lr / (1 - beta1^step)
  F decay;               // 1 - lr * weight_decay
  F gradient;            // the gradient's factor: clips and unscales it; negative to maximise
  F lerp;                // the way of exp_avg to the gradient, 1 - beta1
  F beta2;               // what exp_avg_sq keeps
  F one_minus_beta2;     // what it takes of the squared gradient
  F eps;
};

template <typename F>
struct AdamwElement {
  F param, exp_avg, exp_avg_sq, max_exp_avg_sq;
};

template <bool AMSGRAD, typename F>
SHARED_INLINE AdamwElement<F> adamw_update(AdamwElement<F> x, F gradient, AdamwScalars<F> s) {
  const F grad = gradient * s.gradient;
  // Interpolated from the nearer end, so that both ends are exact.
  const bool near = s.lerp < F(0.5f);
  const F exp_avg = fma(near ? s.lerp : s.lerp - F(1.0f), grad - x.exp_avg, near ? x.exp_avg : grad);
  const F exp_avg_sq = fma(s.one_minus_beta2 * grad, grad, s.beta2 * x.exp_avg_sq);
  // As torch.maximum: NaN if either is.
  const bool kept = x.max_exp_avg_sq >= exp_avg_sq || x.max_exp_avg_sq != x.max_exp_avg_sq;
  const F largest = AMSGRAD && kept ? x.max_exp_avg_sq : exp_avg_sq;
  const F denominator = sqrt(largest) / s.bias_correction2 + s.eps;
  const AdamwElement<F> result = {x.param * s.decay + s.negative_step_size * exp_avg / denominator, exp_avg, exp_avg_sq,
                                  largest};
  return result;
}

}  // namespace torch_fused
