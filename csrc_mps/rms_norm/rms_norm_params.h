// What a launch of the RMS norm kernels is told.
#pragma once
#include "common/shared.h"

namespace torch_fused {

SHARED_CONSTANT uint32_t ALIGNED = 1;  // every row of every operand starts at 16 bytes
SHARED_CONSTANT uint32_t HAS_RESIDUAL =
    2;  // forward: normalise input + residual; backward: that sum has a gradient too
SHARED_CONSTANT uint32_t HAS_WEIGHT = 4;
SHARED_CONSTANT uint32_t LLAMA = 8;         // round before the weight, as Llama's RMSNorm does
SHARED_CONSTANT uint32_t GRAD_WEIGHT = 16;  // the weight needs a gradient

struct RmsNormParams {
  int64_t input_stride;  // elements from row to row; all other operands are dense
  int64_t residual_stride;
  uint32_t cols, flags;
  float eps, weight_offset;
};

struct RmsNormBackwardParams {
  int64_t grad_stride;  // elements from row to row; all other operands are dense
  int64_t x_stride;
  uint32_t rows, cols, flags;
  float eps, weight_offset;
  uint32_t unused;
};

}  // namespace torch_fused
