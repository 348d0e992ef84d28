// What the ops' autograd and autocast functions share.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <type_traits>

namespace torch_fused {

// The op to redispatch to: `find_op<decltype(rms_norm_cpu)>("torch_fused::rms_norm")`. Keep it in a static.
template <class Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline bool needs_gradient(const at::Tensor& tensor) {
  return at::GradMode::is_enabled() && tensor.requires_grad();
}

// Whether forward-mode differentiation goes through the tensor. Torch has one level of it at a time, and torch.func
// makes its own of that.
inline bool has_tangent(const at::Tensor& tensor) {
  return tensor._fw_grad(/*level=*/0).defined();
}

// Whether any tensor can need a gradient or have a tangent.
inline bool may_differentiate() {
  return at::GradMode::is_enabled() || torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
}

// Whether a transform of torch.func is running.
inline bool in_transform() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// For an op that has no derivative.
inline void check_not_differentiated(const char* op, const char* argument, const at::Tensor& tensor) {
  TORCH_CHECK(!needs_gradient(tensor), op, ": ", argument,
              " requires grad, but the op is not differentiable: call it under torch.no_grad()");
  TORCH_CHECK(!has_tangent(tensor), op, ": ", argument,
              " has a tangent, but the op is not differentiable: take torch.autograd.forward_ad.unpack_dual(tensor)"
              ".primal");
}

// Where torch itself differentiates an op, it differentiates the reference in plain torch (ops/<op>.py): every
// transform and every order of derivative knows those steps.
inline c10::OperatorHandle reference_of(const std::string& op) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("torch_fused_reference::" + op).c_str(), "");
}

// The autograd kernel of an op whose gradient is `Function`, a torch::autograd::Function that names the op:
// `static constexpr char op[] = "rms_norm"`. It serves the first order outside of torch.func; its backward op takes
// care of the orders above.
template <class Function, class Signature>
struct Differentiable;

template <class Function, class Result, class... Args>
struct Differentiable<Function, Result(Args...)> {
  static Result call(Args... args) {
    if (any(has_tangent, args...)) return reference(args...);
    if (!any(needs_gradient, args...)) return run(args...);
    if (in_transform()) return reference(args...);
    auto results = Function::apply(args...);
    if constexpr (std::is_same_v<Result, at::Tensor>) {
      return results;
    } else {
      return {results[0], results[1]};
    }
  }

  static Result reference(Args... args) {
    static const auto op = reference_of(Function::op).template typed<Result(Args...)>();
    run(args...);  // it checks the arguments, the reference does not
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);  // it has been applied to the op
    return op.call(args...);
  }

 private:
  static Result run(Args... args) {
    static const auto op = find_op<Result(Args...)>((std::string("torch_fused::") + Function::op).c_str());
    at::AutoDispatchBelowADInplaceOrView below;
    return op.call(args...);
  }

  template <class... Values>
  static bool any(bool (*test)(const at::Tensor&), const Values&... values) {
    return (holds(test, values) || ...);
  }

  template <class Value>
  static bool holds(bool (*test)(const at::Tensor&), const Value& value) {
    if constexpr (std::is_same_v<Value, at::Tensor>) {
      return test(value);
    } else if constexpr (std::is_same_v<Value, std::optional<at::Tensor>>) {
      return value && test(*value);
    } else {
      return false;
    }
  }
};

// The autograd kernel of an op that has no such function, as the backward ops.
inline void differentiate_by_reference(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  const bool differentiated = std::any_of(arguments.begin(), arguments.end(), [](const c10::IValue& value) {
    return value.isTensor() && (needs_gradient(value.toTensor()) || has_tangent(value.toTensor()));
  });
  const auto run = [&](torch::jit::Stack* on) {
    at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(on);
  };
  if (!differentiated) return run(stack);
  torch::jit::Stack copy(arguments.begin(), arguments.end());
  run(&copy);  // it checks the arguments, the reference does not
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const std::string name = op.schema().name();
  reference_of(name.substr(name.find("::") + 2)).callBoxed(stack);
}

inline torch::CppFunction differentiable_by_reference() {
  return torch::CppFunction::makeFromBoxedFunction<&differentiate_by_reference>();
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
