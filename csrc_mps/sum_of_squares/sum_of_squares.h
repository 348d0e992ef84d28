// Shared by sum_of_squares.cpp (CPU) and sum_of_squares_launch.cpp (GPU).
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace torch_fused {

// The tensors with elements, each as flat memory in any order. Throws if a tensor cannot be summed.
std::vector<at::Tensor> check_sum_of_squares(at::TensorList tensors);

at::Tensor sum_of_squares_cpu(at::TensorList tensors);
at::Tensor sum_of_squares_gpu(at::TensorList tensors);

}  // namespace torch_fused
