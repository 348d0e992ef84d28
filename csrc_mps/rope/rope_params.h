// What a launch of the rotary kernel is told.
#pragma once
#include "common/shared.h"

namespace torch_fused {

SHARED_CONSTANT uint32_t ALIGNED = 1;     // every half of every head starts at 16 bytes
SHARED_CONSTANT uint32_t LLAMA = 2;       // the roundings of Hugging Face's code
SHARED_CONSTANT uint32_t TRANSPOSED = 4;  // the gradient: turned back

// In elements.
struct RopeHeadStrides {
  int64_t from_batch, from_token, from_head, to_batch, to_token, to_head;
};

struct RopeParams {
  RopeHeadStrides q, k;
  int64_t cos_batch, cos_token, sin_batch, sin_token;
  uint32_t tokens, q_heads;
  uint32_t heads;  // of q and k together
  uint32_t half_dim, head_dim, flags;
};

}  // namespace torch_fused
