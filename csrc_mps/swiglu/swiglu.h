// What swiglu.cpp (CPU) and swiglu_launch.cpp (GPU) share: the kernels' signatures and the checked call.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <tuple>
#include <vector>

#include "../common/rows.h"

namespace torch_fused {

// The operands of one call as rows of `cols` elements: a single row if all of them are dense.
struct SwigluRows {
  int64_t rows, cols;
  std::vector<Rows> operands;
};

// Checks that all operands of `op` are alike; a message names the op, the argument, what it got and what it takes.
SwigluRows check_swiglu(const char* op, std::initializer_list<std::pair<const char*, const at::Tensor*>> operands);
// Whether gelu is the one by tanh; `approximate` must be "tanh" or "none".
bool is_tanh(const char* op, std::string_view approximate);

// activation(gate) * up
using SiluMulSignature = at::Tensor(const at::Tensor& gate, const at::Tensor& up, std::string_view casting_mode);
SiluMulSignature silu_mul_cpu, silu_mul_gpu;
using GeluMulSignature = at::Tensor(const at::Tensor& gate, const at::Tensor& up, std::string_view approximate,
                                    std::string_view casting_mode);
GeluMulSignature gelu_mul_cpu, gelu_mul_gpu;

// The gradients of gate and up.
using SiluMulBackwardSignature = std::tuple<at::Tensor, at::Tensor>(const at::Tensor& grad, const at::Tensor& gate,
                                                                    const at::Tensor& up);
SiluMulBackwardSignature silu_mul_backward_cpu, silu_mul_backward_gpu;
using GeluMulBackwardSignature = std::tuple<at::Tensor, at::Tensor>(const at::Tensor& grad, const at::Tensor& gate,
                                                                    const at::Tensor& up, std::string_view approximate);
GeluMulBackwardSignature gelu_mul_backward_cpu, gelu_mul_backward_gpu;

}  // namespace torch_fused
