// RMS norm of one row in float32.
#pragma once

#include <cmath>
#include <cstdint>

#include "../../common/convert.h"
#include "lanes.h"

namespace torch_fused::TORCH_FUSED_TARGET {

template <class T>
TORCH_FUSED_INLINE void normed(const float* x, const T* weight, int64_t n, float eps, float* to) {
  Lanes squares = {}, values;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    load(x + i, values);
    squares += values * values;
  }
  float sum = sum_of(squares);
  for (; i < n; ++i) sum += x[i] * x[i];
  const float scale = 1 / std::sqrt(sum / static_cast<float>(n) + eps);
  for (i = 0; i < n; ++i) to[i] = x[i] * scale * widen(weight[i]);
}

}  // namespace torch_fused::TORCH_FUSED_TARGET
