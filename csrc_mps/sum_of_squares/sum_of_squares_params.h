// The parameters of a sum_of_squares launch: up to 28 tensors with a buffer each; 30 buffers in total.
#pragma once
#include "common/shared.h"

namespace torch_fused {

SHARED_CONSTANT uint32_t SUMMED = 28;
SHARED_CONSTANT uint32_t SUM_THREADS = 256;
SHARED_CONSTANT uint32_t SUM_PACKS = 8;  // that a thread sums
SHARED_CONSTANT uint32_t TOTAL_THREADS = 1024;

struct SumOfSquaresParams {
  int64_t numel[SUMMED];
  uint32_t first[SUMMED];  // the first threadgroup of each tensor; past the grid for those that are not there
  uint32_t aligned;        // bit i: tensor i starts at 16 bytes
  uint32_t first_partial;  // where the sums of this launch go
};

struct TotalParams {
  uint32_t count, unused;
};

}  // namespace torch_fused
