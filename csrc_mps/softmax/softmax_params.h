// What a launch of the softmax kernels is told.
#pragma once
#include "common/shared.h"

namespace torch_fused {

struct SoftmaxParams {
  int64_t input_stride;   // elements from row to row; the result is dense
  int64_t output_stride;  // of the output that the gradient starts from
  uint32_t cols;
  uint32_t aligned;  // every row of every operand starts at 16 bytes
  uint32_t chunk;    // columns a threadgroup takes of a row shared by several
  uint32_t chunks;   // threadgroups a row
};

}  // namespace torch_fused
