// The names of the element types in kernel names.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace torch_fused {

inline std::string dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return "f32";
    case at::kHalf:
      return "f16";
    case at::kBFloat16:
      return "bf16";
    default:
      TORCH_CHECK(false, "torch_fused: GPU kernels take float32, float16 or bfloat16, got ", dtype);
  }
}

}  // namespace torch_fused
