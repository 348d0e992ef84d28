// Tensors that are negated or conjugated only when they are read. Torch's own way with them crashes where an op writes
// an argument and returns nothing.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace torch_fused {

// Calls `op` with copies of such tensors; throws if it is one that the op writes.
void resolve_lazy_views(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack);

}  // namespace torch_fused

// TORCH_FUSED_WRITES(kv_append_): for every op that writes an argument.
#define TORCH_FUSED_WRITES(op)                                                                  \
  TORCH_LIBRARY_IMPL(torch_fused, Negative, m) {                                                \
    m.impl(#op, torch::CppFunction::makeFromBoxedFunction<&torch_fused::resolve_lazy_views>()); \
  }                                                                                             \
  TORCH_LIBRARY_IMPL(torch_fused, Conjugate, m) {                                               \
    m.impl(#op, torch::CppFunction::makeFromBoxedFunction<&torch_fused::resolve_lazy_views>()); \
  }
