// A loop compiled for each type that a matrix, a vector or a cache can have.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "../../common/simd.h"
#include "../decode_params.h"

namespace torch_fused::TORCH_FUSED_TARGET {

// Calls function(data as T*) with the type that `format` names.
template <class Void, class Function>
TORCH_FUSED_INLINE void with_format(uint32_t format, Void* data, Function function) {
  constexpr bool is_const = std::is_const_v<Void>;
  if (format == kFloat32) {
    function(static_cast<std::conditional_t<is_const, const float, float>*>(data));
  } else if (format == kFloat16) {
    function(static_cast<std::conditional_t<is_const, const c10::Half, c10::Half>*>(data));
  } else {
    function(static_cast<std::conditional_t<is_const, const c10::BFloat16, c10::BFloat16>*>(data));
  }
}

}  // namespace torch_fused::TORCH_FUSED_TARGET
