// What a launch of the layer norm kernels is told.
#pragma once
#include "common/shared.h"

namespace torch_fused {

SHARED_CONSTANT uint32_t ALIGNED = 1;  // every row of every operand starts at 16 bytes
SHARED_CONSTANT uint32_t HAS_WEIGHT = 2;
SHARED_CONSTANT uint32_t HAS_BIAS = 4;
SHARED_CONSTANT uint32_t GRAD_WEIGHT = 8;  // the weight needs a gradient
SHARED_CONSTANT uint32_t GRAD_BIAS = 16;   // the bias does

struct LayerNormParams {
  int64_t input_stride;  // elements from row to row; all other operands are dense
  uint32_t cols, flags;
  float eps;
  uint32_t unused;
};

struct LayerNormBackwardParams {
  int64_t grad_stride;  // elements from row to row; all other operands are dense
  int64_t x_stride;
  uint32_t rows, cols, flags;
  float eps;
};

}  // namespace torch_fused
