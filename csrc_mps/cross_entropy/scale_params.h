// What a launch of the scale kernel is told.
#pragma once
#include "common/shared.h"

namespace torch_fused {

SHARED_CONSTANT uint32_t SCALE_THREADS = 256;
SHARED_CONSTANT uint32_t SCALE_PACKS = 4;  // of each thread

struct ScaleParams {
  int64_t numel;
  uint32_t aligned;  // the first element is at 16 bytes
  uint32_t unused;
};

}  // namespace torch_fused
