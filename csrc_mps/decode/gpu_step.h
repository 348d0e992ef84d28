// A decode step on a GPU as its launches are gathered.
#pragma once

#include <initializer_list>

#include "../runtime/launch.h"
#include "decode.h"

namespace torch_fused {

// One step: its memory, and its launches so far.
struct GpuStep {
  const DecodeCall& call;
  const Decoder& model;
  at::Tensor states, qkv, attended, stats, gates, logits;
  int64_t chunks;
  LaunchList launches;
};

// What a product reads and writes besides its matrices.
struct StepVectors {
  const at::Tensor& from;
  const at::Tensor& to;
  const at::Tensor* norm;  // null for none
  int64_t steps, kept;
  bool add;
};

// Products with matrices that one kernel can read, one below the other; with two that gate if `gated`.
void multiply(GpuStep& step, std::initializer_list<const Linear*> matrices, const StepVectors& v, bool gated);
// The product behind attention, whose chunks it puts together if there are several.
void multiply_attended(GpuStep& step, const Linear& o);
void embed(GpuStep& step);

}  // namespace torch_fused
