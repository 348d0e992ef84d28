// The names of the element types in kernel names.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace torch_fused {

inline std::string dtype_name(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return "f32";
    case at::kHalf:
      return "f16";
    case at::kBFloat16:
      return "bf16";
    default:
      TORCH_CHECK(false, "torch_fused: GPU kernels take float32, float16 or bfloat16, got ", tensor.scalar_type());
  }
}

}  // namespace torch_fused
