// What a launch of column_sum is told.
#pragma once
#include "common/shared.h"

namespace torch_fused {

struct ColumnSumParams {
  uint32_t rows, cols;
};

SHARED_CONSTANT uint32_t COLUMNS = 8;  // of a threadgroup: few, so that there are threadgroups for the whole GPU

}  // namespace torch_fused
