// Registers one op's kernels for every device, once: the CPU kernel, and the GPU function for MPS, CUDA and the
// emulator.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "../runtime/launch.h"

namespace torch_fused {

// Remembers and warns once that `op` uses torch on a GPU because its Metal source cannot be built; throws instead when
// TORCH_FUSED_STRICT=1.
void note_fallback(const char* op, const char* reason);

template <class Op, class Signature>
struct Kernels;

template <class Op, class Result, class... Args>
struct Kernels<Op, Result(Args...)> {
  static Result gpu(Args... args) {
    try {
      return Op::gpu(args...);
    } catch (const LibraryUnavailable& error) {
      note_fallback(Op::name, error.what());
    }
    static const auto reference =
        c10::Dispatcher::singleton().findSchemaOrThrow(Op::reference, "").template typed<Result(Args...)>();
    return reference.call(args...);
  }
  static Result cpu(Args... args) { return emulating() ? gpu(args...) : Op::cpu(args...); }
};

}  // namespace torch_fused

#ifdef __APPLE__
#define TORCH_FUSED_IMPL_MPS(op, function)  \
  TORCH_LIBRARY_IMPL(torch_fused, MPS, m) { \
    m.impl(#op, function);                  \
  }
#else
#define TORCH_FUSED_IMPL_MPS(op, function)
#endif

// TORCH_FUSED_KERNELS(rms_norm) registers rms_norm_cpu and rms_norm_gpu, two functions of one signature. If a GPU
// source cannot be built, the op runs torch_fused_reference::rms_norm, which ops/rms_norm.py defines in plain torch.
#define TORCH_FUSED_KERNELS(op) TORCH_FUSED_KERNELS_NAMED(op, op)

// The same for an op whose functions have another name: adamw_ of adamw_cpu and adamw_gpu.
#define TORCH_FUSED_KERNELS_NAMED(op, function)                                                           \
  namespace {                                                                                             \
  struct function##_op {                                                                                  \
    static constexpr char name[] = #op;                                                                   \
    static constexpr char reference[] = "torch_fused_reference::" #op;                                    \
    static constexpr auto cpu = &torch_fused::function##_cpu;                                             \
    static constexpr auto gpu = &torch_fused::function##_gpu;                                             \
  };                                                                                                      \
  using function##_kernels =                                                                              \
      torch_fused::Kernels<function##_op, std::remove_pointer_t<decltype(&torch_fused::function##_gpu)>>; \
  }                                                                                                       \
  TORCH_LIBRARY_IMPL(torch_fused, CPU, m) {                                                               \
    m.impl(#op, &function##_kernels::cpu);                                                                \
  }                                                                                                       \
  TORCH_LIBRARY_IMPL(torch_fused, CUDA, m) {                                                              \
    m.impl(#op, &function##_kernels::gpu);                                                                \
  }                                                                                                       \
  TORCH_FUSED_IMPL_MPS(op, &function##_kernels::gpu)
