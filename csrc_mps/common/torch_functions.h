// Functions of torch whose own headers take seconds to compile.
#pragma once

#include <ATen/core/Tensor.h>

namespace torch_fused {

at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options);
at::Tensor empty_like(const at::Tensor& tensor);
at::Tensor zeros(at::IntArrayRef sizes, const at::TensorOptions& options);

// The dtype that autocast casts to on such a device.
at::ScalarType autocast_dtype(c10::DeviceType device);
// `tensor` in `dtype`, if autocast casts it. Autocast keeps the casts of weights.
at::Tensor autocast_to(at::ScalarType dtype, const at::Tensor& tensor, c10::DeviceType device);

}  // namespace torch_fused
