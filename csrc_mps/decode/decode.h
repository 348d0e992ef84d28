// What decode.cpp (CPU) and decode_launch.cpp (GPU) share: the model as it was read, and the checked call.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <torch/custom_class.h>

#include <optional>
#include <string>
#include <vector>

#include "../common/memory.h"
#include "../runtime/launch.h"
#include "decode/decode_params.h"

namespace torch_fused {

constexpr int64_t kMostBatch = 8, kMostSteps = 8;

inline uint32_t format_of(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat ? kFloat32 : tensor.scalar_type() == at::kHalf ? kFloat16 : kBFloat16;
}

// A linear layer: results are rows * x + bias. Its rows are dense, of its own dtype, or packed: uint32 words of codes
// with a scale and a bias for each group of columns.
struct Linear {
  at::Tensor weight;
  at::Tensor scales, group_biases;  // undefined unless it is packed
  std::optional<at::Tensor> bias;
  int64_t cols = 0, bits = 0, group_size = 0;  // no bits: it is not packed

  int64_t rows() const { return weight.size(0); }
  bool is_packed() const { return bits > 0; }
  // Whether one kernel can read both.
  bool is_like(const Linear& other) const;
};

struct DecoderLayer {
  at::Tensor input_norm, post_attention_norm;
  Linear q, k, v, o, gate, up, down;
  std::optional<at::Tensor> q_norm, k_norm;
  int64_t window;  // the last slots that a token attends, its own included; 0 for all
};

// A decoder's tensors and numbers, checked when it is made and not again: a step reads them as they are.
struct Decoder : torch::CustomClassHolder {
  // `layers` has, one layer after the other, what LAYER_PARTS in ops/decode.py names.
  // `groups` has the scales and the biases of each packed matrix, in the order embedding, head, layers.
  Decoder(const at::Tensor& embedding, const std::vector<std::optional<at::Tensor>>& layers, const at::Tensor& norm,
          const at::Tensor& head, const std::vector<at::Tensor>& groups, int64_t heads, double eps, double scaling,
          const std::vector<int64_t>& windows, bool int8_products);

  // A tensor of the model, and what it was when it was checked: its owner can give it other memory at any time, as
  // `parameter.data = tensor` does.
  struct Taken {
    std::string name;
    at::Tensor original, tensor;
    const void* data;
  };
  // One that is not what it was, or null.
  const Taken* changed() const;

  Linear embedding, head;
  at::Tensor norm;
  std::vector<DecoderLayer> layers;
  int64_t hidden, heads, kv_heads, head_dim, intermediate, vocabulary;
  double eps, scaling;
  bool int8_products;  // a CPU's with packed matrices
  std::vector<Taken> taken;
  MemoryMap memory;         // where they are
  mutable Repeats repeats;  // a GPU's steps
};

using DecoderPtr = c10::intrusive_ptr<Decoder>;

// One checked call.
struct DecodeCall {
  const Decoder& model;
  at::Tensor token_ids, positions;
  std::optional<at::Tensor> starts;
  at::Tensor cos, sin;
  at::TensorList keys, values;
  int64_t batch, steps, length, kept;  // of each sequence's tokens, the last `kept` get logits
  int64_t rotary_dim;

  int64_t tokens() const { return batch * steps; }
  int64_t projected() const { return (model.heads + 2 * model.kv_heads) * model.head_dim; }  // of q, k and v of a token
};

// A message names the argument, what it got and what it takes. On a GPU the indices are not looked at: the kernels stay
// within the tables whatever they are.
DecodeCall check_decode(const DecoderPtr& model, const at::Tensor& token_ids, const at::Tensor& positions,
                        const std::optional<at::Tensor>& starts, const at::Tensor& cos, const at::Tensor& sin,
                        at::TensorList keys, at::TensorList values, int64_t length, int64_t logits_to_keep);

// Logits (batch, kept, vocabulary), float32.
at::Tensor decode_cpu(const DecoderPtr& model, const at::Tensor& token_ids, const at::Tensor& positions,
                      const std::optional<at::Tensor>& starts, const at::Tensor& cos, const at::Tensor& sin,
                      at::TensorList keys, at::TensorList values, int64_t length, int64_t logits_to_keep);
at::Tensor decode_gpu(const DecoderPtr& model, const at::Tensor& token_ids, const at::Tensor& positions,
                      const std::optional<at::Tensor>& starts, const at::Tensor& cos, const at::Tensor& sin,
                      at::TensorList keys, at::TensorList values, int64_t length, int64_t logits_to_keep);

}  // namespace torch_fused
