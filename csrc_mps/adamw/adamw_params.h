// What the kernels of adamw are told.
#pragma once
#include "adamw/update.h"
#include "common/shared.h"

namespace torch_fused {

// Of four buffers each, so that with the numbers and the parameters all are 30 of Metal's 31.
SHARED_CONSTANT uint32_t TENSORS = 7;
// Of five buffers each: 27.
SHARED_CONSTANT uint32_t AMSGRAD_TENSORS = 5;
SHARED_CONSTANT uint32_t THREADS = 256;

struct AdamwParams {
  int64_t numel[TENSORS];
  uint32_t first[TENSORS];  // the first threadgroup of each tensor; past the grid for those that are not there
  uint32_t aligned;         // bit i: the operands of tensor i start at 16 bytes
  float bias_correction2[TENSORS];
  float negative_step_size[TENSORS];
  float decay, gradient, lerp, beta2, one_minus_beta2, eps;
  uint32_t has_numbers;  // the scalars of tensor i are in numbers[first_number + i], not here
  uint32_t first_number;
};

// What adamw_numbers makes for each tensor, where the host does not know it.
struct AdamwNumbers {
  AdamwScalars<float> scalars;
  float skip;  // not 0: a gradient is infinite or NaN, so nothing is updated
};

// A launch of adamw_numbers has a buffer for the step of each of this many tensors.
SHARED_CONSTANT uint32_t STEPS = 21;

SHARED_CONSTANT uint32_t STEPS_ON_DEVICE = 1, HAS_LR = 2, HAS_BETA1 = 4, HAS_BETA2 = 8, HAS_GRAD_SCALE = 16,
                         HAS_FOUND_INF = 32, CLIPS = 64;

struct AdamwNumbersParams {
  uint32_t tensors, first_number, flags;         // the flags say which of the values below are in a buffer instead
  float lr, beta1, beta1_low, beta2, beta2_low;  // a beta is the sum of two
  float lerp, one_minus_beta2;                   // 1 - beta1 and 1 - beta2, rounded once
  float sign, max_grad_norm, weight_decay, eps;
  float steps[STEPS + 1];  // the number of this step, from 1; one more for the size
};

}  // namespace torch_fused
