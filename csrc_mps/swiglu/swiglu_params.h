// What a launch of the SwiGLU kernels is told.
#pragma once
#include "common/shared.h"

namespace torch_fused {

SHARED_CONSTANT uint32_t ALIGNED = 1;  // every row of every operand starts at 16 bytes
SHARED_CONSTANT uint32_t LLAMA = 2;    // the roundings of Hugging Face's code

struct SwigluParams {
  int64_t cols;
  int64_t gate_stride;  // elements from row to row; the results are dense
  int64_t up_stride, grad_stride;
  uint32_t groups;  // threadgroups a row
  uint32_t flags;
};

}  // namespace torch_fused
