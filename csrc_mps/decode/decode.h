// One checked call of a decode step, and its implementations.
#pragma once

#include <algorithm>

#include "decoder.h"

namespace torch_fused {

constexpr int64_t kMostBatch = 8, kMostSteps = 8;

// One checked call.
struct DecodeCall {
  const Decoder& model;
  at::Tensor token_ids, positions;
  OptionalTensor starts;
  at::Tensor cos, sin;
  at::TensorList keys, values;
  int64_t batch, steps, length, kept;  // of each sequence's tokens, the last `kept` get logits
  int64_t rotary_dim;
  at::IntArrayRef dropped;

  // How many of the cache's first slots a layer with a window has dropped.
  int64_t dropped_of(size_t layer) const { return dropped.empty() ? 0 : dropped[layer]; }

  // A layer's tables of angles (positions, rotary_dim), any if it has none.
  at::Tensor table_of(const at::Tensor& tables, const DecoderLayer& layer) const {
    return tables.dim() == 2 ? tables : tables.select(0, std::max<int64_t>(layer.table, 0));
  }
  int64_t rotary_dim_of(const DecoderLayer& layer) const { return layer.table < 0 ? 0 : rotary_dim; }

  int64_t tokens() const { return batch * steps; }
  int64_t projected() const { return (model.heads + 2 * model.kv_heads) * model.head_dim; }  // of q, k and v of a token
};

// Error messages name the argument. On a GPU the indices are not checked: the kernels stay
// within the tables for any indices.
DecodeCall check_decode(const DecoderPtr& model, const at::Tensor& token_ids, const at::Tensor& positions,
                        const OptionalTensor& starts, const at::Tensor& cos, const at::Tensor& sin, at::TensorList keys,
                        at::TensorList values, int64_t length, int64_t logits_to_keep, at::IntArrayRef dropped);

// Logits (batch, kept, vocabulary), float32.
using DecodeSignature = at::Tensor(const DecoderPtr& model, const at::Tensor& token_ids, const at::Tensor& positions,
                                   const OptionalTensor& starts, const at::Tensor& cos, const at::Tensor& sin,
                                   at::TensorList keys, at::TensorList values, int64_t length, int64_t logits_to_keep,
                                   at::IntArrayRef dropped);
DecodeSignature decode_cpu, decode_gpu;

// The logits as a product of the head made them, scaled and capped in place.
void finish_logits(const Decoder& model, const at::Tensor& logits);

}  // namespace torch_fused
