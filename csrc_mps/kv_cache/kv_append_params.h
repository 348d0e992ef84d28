// The parameters of a kv_append launch.
#pragma once
#include "common/shared.h"

namespace torch_fused {

struct KvStrides {
  int64_t batch, head, token, unit;
};

struct KvCopy {
  KvStrides to, from;
  uint32_t units;  // of the whole copy
  uint32_t width;  // units per token of a head
};

struct KvAppendParams {
  KvCopy keys, values;
  uint32_t heads, tokens;
};

}  // namespace torch_fused
