// A decode step on a GPU while its launches are collected.
#pragma once

#include <initializer_list>

#include "../runtime/launch.h"
#include "decode.h"

namespace torch_fused {

// One step: its memory, and its launches so far.
struct GpuStep {
  const DecodeCall& call;
  const Decoder& model;
  at::Tensor states, output, qkv, attended, stats, gates, ups, logits;  // output: normed before it is added to states
  int64_t chunks;
  LaunchList launches;
};

// The operands of a product besides its matrices.
struct StepVectors {
  const at::Tensor& from;
  const at::Tensor& to;
  const OptionalTensor& norm;
  int64_t steps, kept;
  bool add;          // to what is there
  double scale = 1;  // of the results
};

// Products with matrices that one kernel can read, one below the other; with two that gate if `gated`.
void multiply(GpuStep& step, std::initializer_list<const Linear*> matrices, const StepVectors& v, bool gated);
// The product after attention. It combines the chunks of attention if there are several.
void multiply_attended(GpuStep& step, const Linear& o, const at::Tensor& to, bool add, double scale);
void embed(GpuStep& step);
// activation(gate) * up, where adapters come before it.
void gate(GpuStep& step, const at::Tensor& gates, const at::Tensor& ups);
// The output of the feed-forward layers, to `to`, times `scale`; without output norms.
void feed_forward(GpuStep& step, const DecoderLayer& layer, const at::Tensor& to, bool add, double scale);
// The output of the experts, added to the states.
void feed_forward_of_experts(GpuStep& step, const DecoderLayer& layer);
// RMS norm of each token's row, in place or added to `to`.
void norm_rows(GpuStep& step, const at::Tensor& from, const at::Tensor& norm, const at::Tensor& to, bool add,
               double scale);

}  // namespace torch_fused
