// What layer_norm.cpp (CPU) and layer_norm_launch.cpp (GPU) share: the kernels' signatures and the checked call.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace torch_fused {

// One checked call: the input seen as rows of `cols` elements.
struct LayerNorm {
  int64_t rows, cols;
  double eps;
};

// Checks the arguments of `op`; the message names the op, the argument, what it got and what it takes.
LayerNorm check_layer_norm(const char* op, const at::Tensor& input, at::IntArrayRef normalized_shape,
                           const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias, double eps);
// Checks those of layer_norm_backward.
LayerNorm check_layer_norm_backward(const at::Tensor& grad, const at::Tensor& x, at::IntArrayRef normalized_shape,
                                    const std::optional<at::Tensor>& weight, double eps);

using LayerNormSignature = at::Tensor(const at::Tensor& input, at::IntArrayRef normalized_shape,
                                      const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                                      double eps);
LayerNormSignature layer_norm_cpu, layer_norm_gpu;

// The gradient of x, where y = norm(x), and those of the weight and the bias that are needed, in this order, stacked:
// (0 to 2, *normalized_shape).
using LayerNormBackwardSignature = std::tuple<at::Tensor, at::Tensor>(const at::Tensor& grad, const at::Tensor& x,
                                                                      at::IntArrayRef normalized_shape,
                                                                      const std::optional<at::Tensor>& weight,
                                                                      double eps, bool need_weight_grad,
                                                                      bool need_bias_grad);
LayerNormBackwardSignature layer_norm_backward_cpu, layer_norm_backward_gpu;

// An empty tensor for those gradients of parameters.
at::Tensor empty_parameter_grads(const at::Tensor& x, at::IntArrayRef normalized_shape, bool need_weight_grad,
                                 bool need_bias_grad);

}  // namespace torch_fused
