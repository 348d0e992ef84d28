// The model of a decode step.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common/memory.h"
#include "../runtime/launch.h"
#include "decode/decode_params.h"

namespace torch_fused {

using OptionalTensor = std::optional<at::Tensor>;

inline uint32_t format_of(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat ? kFloat32 : tensor.scalar_type() == at::kHalf ? kFloat16 : kBFloat16;
}

struct Adapter;

// A linear layer: rows * x + bias, plus its adapters. Its rows are dense, with their own dtype, or
// packed: uint32 words of codes with a scale and a bias for each group of columns.
struct Linear {
  at::Tensor weight;
  at::Tensor scales, group_biases;  // undefined unless it is packed
  OptionalTensor bias;
  int64_t cols = 0, bits = 0, group_size = 0;  // no bits: it is not packed
  std::vector<Adapter> adapters;

  int64_t rows() const { return weight.defined() ? weight.size(0) : 0; }
  bool is_packed() const { return bits > 0; }
  // Whether one kernel can read both.
  bool is_like(const Linear& other) const;
};

// A low-rank adapter (LoRA): adds scale * b * (a * x).
struct Adapter {
  Linear a, b;
  double scale;
};

struct DecoderLayer {
  bool has_experts() const { return router.rows() > 0; }
  bool has_feed_forward() const { return gate.rows() > 0; }
  int64_t experts() const { return router.rows(); }

  // Norms before attention and the feed-forward layers, and of their outputs before the residual addition.
  OptionalTensor input_norm, attention_output_norm, post_attention_norm, feed_forward_output_norm;
  Linear q, k, v, o, gate, up, down;
  OptionalTensor q_norm, k_norm;  // of each head, or of all as one
  // A mixture of experts: a router selects some for each token. gate, up and down, if present, are then those of
  // an expert that all tokens share, times the sigmoid of `shared_gate`.
  Linear router, shared_gate;
  at::Tensor experts_gate, experts_up, experts_down;  // (experts, rows, cols)
  int64_t window;  // the last slots that a token attends to, including its own; 0 for all
  int64_t table;   // the index of its stacked table of angles, -1 for none
};

// A decoder's numbers, in the order of `Numbers` in ops/decoder.py.
struct DecoderNumbers {
  double eps, scaling, norm_offset, embedding_scale, residual_scale, logits_scale, attention_softcap, logits_softcap,
      experts_per_token, normalise_experts;

  int64_t chosen() const { return static_cast<int64_t>(experts_per_token); }
};

// A decoder's tensors and numbers, checked only when it is created.
struct Decoder : torch::CustomClassHolder {
  // `layers` has, one layer after the other, what LAYER_PARTS in ops/decoder.py names.
  // `adapters` has an a and a b for each of `adapter_places`, which are matrices' places in `layers`.
  // `groups` has the scales and the biases of each packed matrix, in the order embedding, head, layers.
  Decoder(const at::Tensor& embedding, const std::vector<OptionalTensor>& layers, const at::Tensor& norm,
          const at::Tensor& head, const std::vector<at::Tensor>& groups, int64_t heads,
          const std::vector<double>& numbers, const std::string& activation, const std::vector<int64_t>& windows,
          const std::vector<int64_t>& tables, bool int8_products, const std::vector<at::Tensor>& adapters,
          const std::vector<int64_t>& adapter_places, const std::vector<double>& adapter_scales);

  // A tensor of the model, and its state when it was checked: its owner can give it other memory at any time, as
  // `parameter.data = tensor` does.
  struct Taken {
    std::string name;
    at::Tensor original, tensor;
    const void* data;
  };
  // The constructor's arguments, in order, for the reference and for torch.compile.
  using Arguments = std::tuple<at::Tensor, std::vector<OptionalTensor>, at::Tensor, at::Tensor, std::vector<at::Tensor>,
                               int64_t, std::vector<double>, std::string, std::vector<int64_t>, std::vector<int64_t>,
                               bool, std::vector<at::Tensor>, std::vector<int64_t>, std::vector<double>>;
  Arguments arguments() const;
  // A tensor that has changed since, or null.
  const Taken* changed() const;

  Linear embedding, head;
  at::Tensor norm;
  std::vector<DecoderLayer> layers;
  int64_t hidden, heads, kv_heads, head_dim, vocabulary;
  int64_t intermediate = 0, expert_intermediate = 0, experts = 0;  // the most of any layer
  DecoderNumbers numbers;
  uint32_t activation;
  bool int8_products;  // a CPU's with packed matrices
  std::vector<Taken> taken;
  MemoryMap memory;         // where they are
  mutable Repeats repeats;  // a GPU's steps

 private:
  class Reader;
  // `next` is the router's place among the parts.
  void take_experts(Reader& reader, DecoderLayer& layer, const std::vector<OptionalTensor>& parts, size_t next,
                    const std::string& of_layer);
};

using DecoderPtr = c10::intrusive_ptr<Decoder>;

}  // namespace torch_fused
