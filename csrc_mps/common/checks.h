// Checks of arguments that several ops make; a message names the op, the argument, what it got and what it takes.
#pragma once

#include <ATen/core/Tensor.h>

#include <limits>
#include <string_view>

#include "../runtime/launch.h"

namespace torch_fused {

// Whether tensors of `dtype` on the device of `on` are computed with: float64 only by the CPU's own kernels.
inline bool takes_dtype(at::ScalarType dtype, const at::Tensor& on) {
  return dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16 ||
         (dtype == at::kDouble && on.is_cpu() && !emulating());
}

// "must be" those dtypes, for a message.
inline const char* dtypes_taken(const at::Tensor& on) {
  return on.is_cpu() ? " must be float32, float16 or bfloat16 (or float64 on the CPU), got "
                     : " must be float32, float16 or bfloat16, got ";
}

inline void check_dtype(const char* op, const char* argument, const at::Tensor& tensor) {
  TORCH_CHECK(takes_dtype(tensor.scalar_type(), tensor), op, ": ", argument, dtypes_taken(tensor),
              tensor.scalar_type());
}

// `tensor` must have the dtype and the device of `like`.
inline void check_alike(const char* op, const char* argument, const at::Tensor& tensor, const char* like_argument,
                        const at::Tensor& like) {
  TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), op, ": ", argument, " must have ", like_argument, "'s dtype ",
              like.scalar_type(), ", got ", tensor.scalar_type());
  TORCH_CHECK(tensor.device() == like.device(), op, ": ", argument, " must be on ", like_argument, "'s device ",
              like.device(), ", got ", tensor.device());
}

inline void check_same_shape(const char* op, const char* argument, const at::Tensor& tensor, const char* like_argument,
                             const at::Tensor& like) {
  TORCH_CHECK(tensor.sizes() == like.sizes(), op, ": ", argument, " must have ", like_argument, "'s shape ",
              like.sizes(), ", got ", tensor.sizes());
}

// `grad` must be of the shape, dtype and device of what it is the gradient of.
inline void check_grad(const char* op, const char* argument, const at::Tensor& grad, const char* of_argument,
                       const at::Tensor& of) {
  check_same_shape(op, argument, grad, of_argument, of);
  check_alike(op, argument, grad, of_argument, of);
}

// `size` as a parameter of a GPU kernel, which counts `what` in 32 bits.
inline uint32_t kernel_size(const char* op, const char* what, int64_t size) {
  TORCH_CHECK(size >= 0 && size <= std::numeric_limits<uint32_t>::max(), op, ": a GPU takes at most 2^32 - 1 ", what,
              ", got ", size);
  return static_cast<uint32_t>(size);
}

// Whether the casting mode is "llama"; it must be that or "torch".
inline bool is_llama(const char* op, std::string_view casting_mode) {
  TORCH_CHECK(casting_mode == "torch" || casting_mode == "llama", op,
              ": casting_mode must be 'torch' or 'llama', got '", casting_mode, "'");
  return casting_mode == "llama";
}

}  // namespace torch_fused
