// What a launch of adamw is told: up to seven tensors, of four buffers each, so that all are 29 of Metal's 31.
#pragma once
#include "common/shared.h"

namespace torch_fused {

SHARED_CONSTANT uint32_t TENSORS = 7;
SHARED_CONSTANT uint32_t THREADS = 256;

struct AdamwParams {
  int64_t numel[TENSORS];
  uint32_t first[TENSORS];  // the first threadgroup of each tensor; past the grid for those that are not there
  uint32_t aligned;         // bit i: the four operands of tensor i start at 16 bytes
  float bias_correction2[TENSORS];
  float negative_step_size[TENSORS];
  float decay, sign, lerp, beta2, one_minus_beta2, eps;
};

}  // namespace torch_fused
