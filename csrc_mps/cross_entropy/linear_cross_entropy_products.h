// The matrix products of linear_cross_entropy.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace torch_fused {

// result = left right.
void multiply(const at::Tensor& result, const at::Tensor& left, const at::Tensor& right, double scale = 1);

// logits = hidden weight^T + bias.
void multiply_logits(const at::Tensor& logits, const at::Tensor& hidden, const at::Tensor& weight,
                     const std::optional<at::Tensor>& bias);

// The sum over chunks of left right. Sums of a half type are kept in float32 and rounded once; a single chunk needs no
// such sum.
class ProductSum {
 public:
  ProductSum(at::IntArrayRef sizes, const at::TensorOptions& options, bool one_chunk);

  void add(const at::Tensor& left, const at::Tensor& right, double scale = 1);
  // `memory`, if there is any, holds it until the sum's own is free. Nothing may be added afterwards.
  at::Tensor result(const at::Tensor& memory = {});

 private:
  at::ScalarType dtype_;
  bool wide_, empty_ = true;
  at::Tensor sum_;
};

}  // namespace torch_fused
