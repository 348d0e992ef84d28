// What a launch of the cross entropy kernel is told.
#pragma once
#include "common/shared.h"

namespace torch_fused {

struct CrossEntropyParams {
  int64_t stride;        // elements from row to row of the logits
  int64_t ignore_index;  // a target that has no loss
  uint32_t cols;
  uint32_t aligned;  // every row starts at 16 bytes
  uint32_t scaled;   // whether the logits become gradients
  uint32_t per_row;  // whether each row has a scale of its own
  float smoothing;   // the share of the target's weight that all classes get
  float z_loss;      // the factor of the squared log-sum-exp
};

}  // namespace torch_fused
