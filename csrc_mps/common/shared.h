// For headers that are both C++ and Metal: the same text, so the same bits on every device.
#pragma once

#ifdef __METAL_VERSION__
#include <metal_stdlib>
using namespace metal;
#define SHARED_INLINE inline
#define SHARED_CONSTANT constant constexpr
#else
#include <cmath>
#include <cstdint>

#include "common/simd.h"

namespace torch_fused {
using std::fma;
using std::sqrt;
}  // namespace torch_fused
#define SHARED_INLINE TORCH_FUSED_INLINE
#define SHARED_CONSTANT constexpr
#endif
