#include "torch_functions.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

namespace torch_fused {

at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return at::empty(sizes, options);
}

at::Tensor empty_like(const at::Tensor& tensor) {
  return at::empty_like(tensor);
}

at::Tensor zeros(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return at::zeros(sizes, options);
}

at::ScalarType autocast_dtype(c10::DeviceType device) {
  return at::autocast::get_autocast_dtype(device);
}

at::Tensor autocast_to(at::ScalarType dtype, const at::Tensor& tensor, c10::DeviceType device) {
  return at::autocast::cached_cast(dtype, tensor, device);
}

}  // namespace torch_fused
