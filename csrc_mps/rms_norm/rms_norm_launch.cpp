// RMS norm on a GPU: operands, kernel, grid and parameters of each launch.
#include "rms_norm.h"

#include "../common/checks.h"
#include "../common/column_sum.h"
#include "../common/row_shape.h"
#include "../common/rows.h"
#include "../common/torch_functions.h"
#include "../runtime/launch.h"
#include "rms_norm_params.h"

namespace torch_fused {
namespace {

using at::IntArrayRef;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

uint32_t flags(const RmsNorm& norm, bool residual, bool weight, bool aligned) {
  return (aligned ? ALIGNED : 0) | (residual ? HAS_RESIDUAL : 0) | (weight ? HAS_WEIGHT : 0) | (norm.llama ? LLAMA : 0);
}

std::tuple<Tensor, Tensor> forward_gpu(const RmsNorm& norm, const Tensor& input, const OptionalTensor& residual,
                                       const OptionalTensor& weight) {
  const Tensor output = empty(input.sizes(), input.options());
  const Tensor sum = residual ? empty(input.sizes(), input.options()) : Tensor();
  if (input.numel() == 0) return {output, sum};
  const Rows x = as_rows(input, norm.rows, norm.cols);
  const Rows r = residual ? as_rows(*residual, norm.rows, norm.cols) : x;
  const Tensor w = weight ? weight->contiguous() : x.tensor;
  const RowShape shape = row_shape(norm.cols, input.element_size());
  const bool aligned = all_aligned({x, r, {w, 0}, {output, norm.cols}, {residual ? sum : output, norm.cols}});
  const RmsNormParams params{x.stride,
                             r.stride,
                             kernel_size("rms_norm", "columns", norm.cols),
                             flags(norm, residual.has_value(), weight.has_value(), aligned),
                             static_cast<float>(norm.eps),
                             static_cast<float>(norm.weight_offset)};
  static KernelSet kernels("rms_norm", "rms_norm");
  launch(kernels(input, shape.packs), norm.rows, shape.threads,
         {x.tensor, r.tensor, w, output, residual ? sum : output}, params);
  return {output, sum};
}

}  // namespace

Tensor rms_norm_gpu(const Tensor& input, IntArrayRef normalized_shape, const OptionalTensor& weight,
                    std::optional<double> eps, std::string_view casting_mode, double weight_offset) {
  const RmsNorm norm = check_rms_norm("rms_norm", input, normalized_shape, weight, eps, casting_mode, weight_offset);
  return std::get<0>(forward_gpu(norm, input, std::nullopt, weight));
}

std::tuple<Tensor, Tensor> add_rms_norm_gpu(const Tensor& input, const Tensor& residual, const Tensor& weight,
                                            double eps, std::string_view casting_mode, double weight_offset) {
  check_add_rms_norm(input, residual, weight);
  const RmsNorm norm = check_rms_norm("add_rms_norm", input, weight.sizes(), weight, eps, casting_mode, weight_offset);
  return forward_gpu(norm, input, residual, weight);
}

std::tuple<Tensor, Tensor> rms_norm_backward_gpu(const Tensor& grad, const OptionalTensor& grad_sum, const Tensor& x,
                                                 IntArrayRef normalized_shape, const OptionalTensor& weight,
                                                 std::optional<double> eps, std::string_view casting_mode,
                                                 double weight_offset, bool need_weight_grad) {
  const RmsNorm norm =
      check_rms_norm_backward(grad, grad_sum, x, normalized_shape, weight, eps, casting_mode, weight_offset);
  const Tensor grad_x = empty(x.sizes(), x.options());
  const Tensor grad_weight = empty(need_weight_grad ? normalized_shape : IntArrayRef{0}, x.options());
  if (x.numel() == 0) return {grad_x, zeros(grad_weight.sizes(), x.options())};
  const Rows dy = as_rows(grad, norm.rows, norm.cols), values = as_rows(x, norm.rows, norm.cols);
  const Tensor extra = grad_sum ? grad_sum->contiguous() : grad_x;
  const Tensor w = weight ? weight->contiguous() : values.tensor;
  const RowShape shape = row_shape(norm.cols, x.element_size());
  const int64_t groups = partial_sums(norm.rows, shape.threads);
  const Tensor partial = need_weight_grad ? empty({groups, norm.cols}, x.options().dtype(at::kFloat)) : grad_x;
  const bool aligned = all_aligned({dy, values, {extra, norm.cols}, {w, 0}, {grad_x, norm.cols}});
  RmsNormBackwardParams params{dy.stride,
                               values.stride,
                               kernel_size("rms_norm_backward", "rows", norm.rows),
                               kernel_size("rms_norm_backward", "columns", norm.cols),
                               flags(norm, grad_sum.has_value(), weight.has_value(), aligned),
                               static_cast<float>(norm.eps),
                               static_cast<float>(norm.weight_offset),
                               0};
  if (need_weight_grad) params.flags |= GRAD_WEIGHT;
  static KernelSet kernels("rms_norm_backward", "rms_norm_backward");
  launch(kernels(x, shape.packs), groups, shape.threads, {dy.tensor, extra, values.tensor, w, grad_x, partial}, params);
  if (need_weight_grad) column_sum_gpu(partial, grad_weight);
  return {grad_x, grad_weight};
}

}  // namespace torch_fused
