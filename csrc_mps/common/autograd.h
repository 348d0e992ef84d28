// What the ops' autograd and autocast functions share.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include <algorithm>
#include <initializer_list>
#include <type_traits>

namespace torch_fused {

// The op to redispatch to: `find_op<decltype(rms_norm_cpu)>("torch_fused::rms_norm")`. Keep it in a static.
template <class Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline bool needs_gradient(std::initializer_list<const at::Tensor*> tensors) {
  if (!at::GradMode::is_enabled()) return false;
  return std::any_of(tensors.begin(), tensors.end(), [](const at::Tensor* tensor) { return tensor->requires_grad(); });
}

// Runs `op`, below autograd, and then tells autograd that the tensors of `lists` have changed. Before it does, torch
// refuses to change an inference tensor outside of inference mode.
template <class Op>
auto change(std::initializer_list<at::TensorList> lists, const Op& op) {
  const auto bump = [&](bool inference) {
    for (const at::TensorList list : lists) {
      for (const at::Tensor& tensor : list) {
        if (tensor.is_inference() == inference) torch::autograd::impl::bump_version(tensor);
      }
    }
  };
  bump(true);
  at::AutoDispatchBelowADInplaceOrView below;
  if constexpr (std::is_void_v<decltype(op())>) {
    op();
    bump(false);
  } else {
    auto result = op();
    bump(false);
    return result;
  }
}

}  // namespace torch_fused
