// For headers that are both C++ and Metal: the same text, so the same bits on every device.
#pragma once

#ifdef __METAL_VERSION__
#define SHARED_INLINE inline
#define SHARED_CONSTANT constant constexpr
#else
#include <cstdint>

#include "common/simd.h"
#define SHARED_INLINE TORCH_FUSED_INLINE
#define SHARED_CONSTANT constexpr
#endif
