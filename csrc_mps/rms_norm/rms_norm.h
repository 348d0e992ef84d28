// What rms_norm.cpp (CPU) and rms_norm_launch.cpp (GPU) share: the kernels' signatures and the checked call.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace torch_fused {

// One checked call: x (+ residual) seen as rows of `cols` elements.
struct RmsNorm {
  int64_t rows;
  int64_t cols;
  double eps;
  double weight_offset;
  bool llama;  // casting_mode
};

// Checks the arguments of `op`; the message names the op, the argument, what it got and what it takes.
RmsNorm check_rms_norm(const char* op, const at::Tensor& input, at::IntArrayRef normalized_shape,
                       const std::optional<at::Tensor>& weight, std::optional<double> eps,
                       std::string_view casting_mode, double weight_offset);
void check_add_rms_norm(const at::Tensor& input, const at::Tensor& residual, const at::Tensor& weight);
RmsNorm check_rms_norm_backward(const at::Tensor& grad, const std::optional<at::Tensor>& grad_sum, const at::Tensor& x,
                                at::IntArrayRef normalized_shape, const std::optional<at::Tensor>& weight,
                                std::optional<double> eps, std::string_view casting_mode, double weight_offset);

using RmsNormSignature = at::Tensor(const at::Tensor& input, at::IntArrayRef normalized_shape,
                                    const std::optional<at::Tensor>& weight, std::optional<double> eps,
                                    std::string_view casting_mode, double weight_offset);
RmsNormSignature rms_norm_cpu, rms_norm_gpu;

using AddRmsNormSignature = std::tuple<at::Tensor, at::Tensor>(const at::Tensor& input, const at::Tensor& residual,
                                                               const at::Tensor& weight, double eps,
                                                               std::string_view casting_mode, double weight_offset);
AddRmsNormSignature add_rms_norm_cpu, add_rms_norm_gpu;

// Gradients of x, where y = norm(x), and of the weight (empty unless need_weight_grad). grad_sum, if present, is the
// gradient of x itself, added in.
using RmsNormBackwardSignature = std::tuple<at::Tensor, at::Tensor>(
    const at::Tensor& grad, const std::optional<at::Tensor>& grad_sum, const at::Tensor& x,
    at::IntArrayRef normalized_shape, const std::optional<at::Tensor>& weight, std::optional<double> eps,
    std::string_view casting_mode, double weight_offset, bool need_weight_grad);
RmsNormBackwardSignature rms_norm_backward_cpu, rms_norm_backward_gpu;

}  // namespace torch_fused
