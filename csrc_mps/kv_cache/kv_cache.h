// Shared by kv_cache.cpp (CPU) and kv_cache_launch.cpp (GPU): the kernels' signatures and the checks of a call.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

namespace torch_fused {

// Checks the operands of kv_append_; the message names the argument.
void check_kv_append(const at::Tensor& keys, const at::Tensor& values, const at::Tensor& new_keys,
                     const at::Tensor& new_values, int64_t position);

using KvAppendSignature = void(const at::Tensor& keys, const at::Tensor& values, const at::Tensor& new_keys,
                               const at::Tensor& new_values, c10::SymInt position);
KvAppendSignature kv_append_cpu, kv_append_gpu;

}  // namespace torch_fused
