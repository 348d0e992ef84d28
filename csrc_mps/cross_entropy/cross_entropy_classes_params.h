// What a launch of the cross entropy kernels of one chunk of classes is told.
#pragma once
#include "common/shared.h"

namespace torch_fused {

struct CrossEntropyClassesParams {
  int64_t ignore_index;  // a target that has no loss
  uint32_t begin;        // the chunk's first class
  uint32_t cols;         // classes of the chunk
  uint32_t stride;       // the same, as a multiple of 16 bytes: elements from row to row of its logits
  uint32_t classes;      // of all chunks
  uint32_t per_row;      // whether each row has a scale of its own
  float smoothing;       // the share of the target's weight that all classes get
  float z_loss;          // the factor of the squared log-sum-exp
  uint32_t unused;
};

}  // namespace torch_fused
