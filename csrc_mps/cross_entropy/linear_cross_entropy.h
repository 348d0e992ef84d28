// What linear_cross_entropy.cpp and its two ways through the logits share. Either way logits come in chunks and become
// their gradient in place.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "cross_entropy.h"

namespace torch_fused {

// The losses, and the gradients of hidden, weight and bias; those not needed are empty.
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

struct Needs {
  bool hidden = false, weight = false, bias = false;
  bool any() const { return hidden || weight || bias; }
};

// Of rows of hidden states, in a dtype and on a device that all operands share. The gradients of the logits are
// multiplied by `scale`, of one element or of each row; it is there if any gradient is needed.
struct HeadLoss {
  at::Tensor hidden, weight, target;
  std::optional<at::Tensor> bias, scale;
  CrossEntropyOptions options;
  Needs needs;
  double scale_of_products = 1;  // of the products that the gradients of the logits are in
};

// In chunks of rows, each with its losses: their logits are computed once, but every chunk adds to the gradient of the
// whole weight.
Gradients losses_by_rows(const HeadLoss& of);

// In chunks of classes, each with its rows of the weight's gradient, for a row at least of a half type on a GPU. No
// chunk has a row's loss, so that most logits are computed twice; but the weight's gradient needs no sum, and until it
// is written, its memory holds the logits. `own` is how many classes a chunk has whose logits have memory of their own,
// absent for as many as are fast. Throws LibraryUnavailable.
Gradients losses_by_classes(const HeadLoss& of, std::optional<int64_t> own);

}  // namespace torch_fused
