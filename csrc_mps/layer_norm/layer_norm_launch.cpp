// Layer norm on a GPU: operands, kernel, grid and parameters of each launch.
#include "layer_norm.h"

#include "../common/checks.h"
#include "../common/column_sum.h"
#include "../common/row_shape.h"
#include "../common/rows.h"
#include "../common/torch_functions.h"
#include "../runtime/launch.h"
#include "layer_norm_params.h"

namespace torch_fused {
using at::IntArrayRef;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor layer_norm_gpu(const Tensor& input, IntArrayRef normalized_shape, const OptionalTensor& weight,
                      const OptionalTensor& bias, double eps) {
  const LayerNorm norm = check_layer_norm("layer_norm", input, normalized_shape, weight, bias, eps);
  const Tensor output = empty(input.sizes(), input.options());
  if (input.numel() == 0) return output;
  const Rows x = as_rows(input, norm.rows, norm.cols);
  const Tensor w = weight ? weight->contiguous() : x.tensor, b = bias ? bias->contiguous() : x.tensor;
  const RowShape shape = row_shape(norm.cols, input.element_size(), 2, 128);
  const bool aligned = all_aligned({x, {w, 0}, {b, 0}, {output, norm.cols}});
  const LayerNormParams params{x.stride, kernel_size("layer_norm", "columns", norm.cols),
                               (aligned ? ALIGNED : 0) | (weight ? HAS_WEIGHT : 0) | (bias ? HAS_BIAS : 0),
                               static_cast<float>(norm.eps), 0};
  static KernelSet kernels("layer_norm", "layer_norm");
  launch(kernels(input, shape.packs), norm.rows, shape.threads, {x.tensor, w, b, output}, params);
  return output;
}

std::tuple<Tensor, Tensor> layer_norm_backward_gpu(const Tensor& grad, const Tensor& x, IntArrayRef normalized_shape,
                                                   const OptionalTensor& weight, double eps, bool need_weight_grad,
                                                   bool need_bias_grad) {
  const LayerNorm norm = check_layer_norm_backward(grad, x, normalized_shape, weight, eps);
  const Tensor grad_x = empty(x.sizes(), x.options());
  const Tensor grad_params = empty_parameter_grads(x, normalized_shape, need_weight_grad, need_bias_grad);
  if (x.numel() == 0) return {grad_x, grad_params.zero_()};
  const Rows dy = as_rows(grad, norm.rows, norm.cols), values = as_rows(x, norm.rows, norm.cols);
  const Tensor w = weight ? weight->contiguous() : values.tensor;
  const RowShape shape = row_shape(norm.cols, x.element_size());
  const int64_t groups = partial_sums(norm.rows, shape.threads);
  const bool need_sums = need_weight_grad || need_bias_grad;
  const Tensor partial = need_sums ? empty({groups, grad_params.numel()}, x.options().dtype(at::kFloat)) : grad_x;
  const bool aligned = all_aligned({dy, values, {w, 0}, {grad_x, norm.cols}});
  const LayerNormBackwardParams params{dy.stride,
                                       values.stride,
                                       kernel_size("layer_norm_backward", "rows", norm.rows),
                                       kernel_size("layer_norm_backward", "columns", norm.cols),
                                       (aligned ? ALIGNED : 0) | (weight ? HAS_WEIGHT : 0) |
                                           (need_weight_grad ? GRAD_WEIGHT : 0) | (need_bias_grad ? GRAD_BIAS : 0),
                                       static_cast<float>(norm.eps)};
  static KernelSet kernels("layer_norm_backward", "layer_norm_backward");
  launch(kernels(x, shape.packs), groups, shape.threads, {dy.tensor, values.tensor, w, grad_x, partial}, params);
  if (need_sums) column_sum_gpu(partial, grad_params);
  return {grad_x, grad_params};
}

}  // namespace torch_fused
