// What the launches of sampling are told.
#pragma once
#include "common/shared.h"

namespace torch_fused {

struct GreedyParams {
  int64_t row_stride;
  uint32_t vocabulary;
  uint32_t slices;  // of a row
  uint32_t aligned, unused;
};

struct SamplingParams {
  int64_t row_stride;
  uint64_t seed, offset, top_p;
  float temperature, top_k, min_p;
  uint32_t vocabulary;
  uint32_t slices;  // of a row
  uint32_t flags;
};

SHARED_CONSTANT uint32_t ROW_PARAMETERS = 1;  // flags: the filter of each row is in a buffer
SHARED_CONSTANT uint32_t STATE = 2;           // seed and offset are in a buffer

SHARED_CONSTANT uint32_t SLICE = 2048;   // tokens of a threadgroup
SHARED_CONSTANT uint32_t BUCKETS = 256;  // that a row is divided into

}  // namespace torch_fused
