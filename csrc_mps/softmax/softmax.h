// What softmax.cpp (CPU) and softmax_launch.cpp (GPU) share: the kernels' signatures and the checked call.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace torch_fused {

// One checked call: the input seen as rows of `cols` elements.
struct SoftmaxShape {
  int64_t rows, cols;
};

// `input` in `dtype`, if there is one; throws if softmax has no such dtype.
at::Tensor converted(const at::Tensor& input, std::optional<at::ScalarType> dtype);
// Checks the operand of `op`; the message names the op, the argument, what it got and what it takes.
SoftmaxShape check_softmax(const char* op, const char* argument, const at::Tensor& tensor);
// Checks both operands of softmax_backward.
SoftmaxShape check_softmax_backward(const at::Tensor& grad, const at::Tensor& output);

// Over the last dimension, of the input converted to `dtype`.
at::Tensor softmax_cpu(const at::Tensor& input, std::optional<at::ScalarType> dtype);
at::Tensor softmax_gpu(const at::Tensor& input, std::optional<at::ScalarType> dtype);

// The input's gradient from the output y: y * (grad - sum(grad * y)).
at::Tensor softmax_backward_cpu(const at::Tensor& grad, const at::Tensor& output);
at::Tensor softmax_backward_gpu(const at::Tensor& grad, const at::Tensor& output);

}  // namespace torch_fused
