// The parameters of a launch of the kernels for packed matrices.
#pragma once
#include "common/shared.h"

namespace torch_fused {

SHARED_CONSTANT uint32_t kPackedColumns = 16;  // of a row that a lane takes at once: they are in one group
SHARED_CONSTANT uint32_t kPackedBlock = 32 * kPackedColumns;  // and a simdgroup
SHARED_CONSTANT uint32_t kPackedSimdgroups = 4;               // of a threadgroup, without splits
SHARED_CONSTANT uint32_t kHasBias = 1;

struct QuantizedParams {
  int64_t weight_stride, scales_stride, biases_stride;  // words, or elements, from row to row
  int64_t x_stride;                                     // elements from vector to vector; the results are dense
  uint32_t rows, cols, group_size, vectors;
  uint32_t scale_format;  // as the decode step's
  uint32_t splits;        // simdgroups that share a row
  uint32_t flags;
  uint32_t one;  // the bits of 1.0f
};

SHARED_CONSTANT uint32_t kUnpackedColumns = 8;  // per thread

struct UnpackParams {
  int64_t weight_stride, scales_stride, biases_stride;
  uint32_t cols, group_size;
  uint32_t scale_format;
  uint32_t groups;   // threadgroups a row
  uint32_t aligned;  // whether each thread's columns start at 16 bytes
  uint32_t unused;
};

}  // namespace torch_fused
