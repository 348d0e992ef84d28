// What rope.cpp (CPU) and rope_launch.cpp (GPU) share: the kernels' signatures and the checked call.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <tuple>

namespace torch_fused {

// Strides in elements of a tensor seen as (batch, token, head, dim), whose last stride is 1.
struct RopeStrides {
  int64_t batch, token, head;
};

// One operand and its result, whose heads are rotated.
struct RopeHeads {
  at::Tensor input, output;
  RopeStrides from, to;
  int64_t heads;
};

// One checked call.
struct Rope {
  RopeHeads q, k;
  at::Tensor cos, sin;                                 // rows of `rotary_dim` elements, one per token
  int64_t cos_batch, cos_token, sin_batch, sin_token;  // their strides, 0 where a row serves all
  int64_t batch, tokens, head_dim, rotary_dim;
  bool llama;
};

// The names of an op and of its operands.
struct RopeNames {
  const char *op, *q, *k;
};
constexpr RopeNames kRopeForward{"apply_rotary_pos_emb", "q", "k"};
constexpr RopeNames kRopeBackward{"apply_rotary_pos_emb_backward", "grad_q", "grad_k"};

// Checks the arguments of an op and makes the results; a message names the op, the argument, what it got and what it
// takes.
Rope check_rope(const RopeNames& names, const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos,
                const at::Tensor& sin, int64_t unsqueeze_dim, std::string_view casting_mode);

using ApplyRotaryPosEmbSignature = std::tuple<at::Tensor, at::Tensor>(const at::Tensor& q, const at::Tensor& k,
                                                                      const at::Tensor& cos, const at::Tensor& sin,
                                                                      int64_t unsqueeze_dim,
                                                                      std::string_view casting_mode);
ApplyRotaryPosEmbSignature apply_rotary_pos_emb_cpu, apply_rotary_pos_emb_gpu;

// The gradients of q and k: the transposed rotation of the results' gradients.
using ApplyRotaryPosEmbBackwardSignature = std::tuple<at::Tensor, at::Tensor>(const at::Tensor& grad_q,
                                                                              const at::Tensor& grad_k,
                                                                              const at::Tensor& cos,
                                                                              const at::Tensor& sin,
                                                                              int64_t unsqueeze_dim);
ApplyRotaryPosEmbBackwardSignature apply_rotary_pos_emb_backward_cpu, apply_rotary_pos_emb_backward_gpu;

}  // namespace torch_fused
