// RMS norm of one row in float32.
#pragma once

#include <cmath>
#include <cstdint>

#include "../../common/convert.h"
#include "../cpu_step.h"
#include "formats.h"
#include "lanes.h"

namespace torch_fused::TORCH_FUSED_TARGET {

// Of the whole of x with each weight, to which `offset` is added.
struct Norm {
  float eps, offset;
};

TORCH_FUSED_INLINE void normed(const float* x, const Vector& weight, int64_t n, Norm norm, float* to) {
  Lanes squares = {}, values;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    load(x + i, values);
    squares += values * values;
  }
  float sum = sum_of(squares);
  for (; i < n; ++i) sum += x[i] * x[i];
  const float scale = 1 / std::sqrt(sum / static_cast<float>(n) + norm.eps);
  with_format(weight.format, weight.data, [&](const auto* w) __attribute__((always_inline)) {
    for (int64_t j = 0; j < n; ++j) to[j] = x[j] * scale * (widen(w[j]) + norm.offset);
  });
}

}  // namespace torch_fused::TORCH_FUSED_TARGET
