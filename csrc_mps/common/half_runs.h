// Runs of float16 to and from float by the machine's own instructions, which no compiler finds by itself for machines
// of unknown kind. Bits as convert.h's, payloads of NaNs aside.
#pragma once

#include <c10/util/Half.h>

#include <cstdint>

#include "simd.h"

namespace torch_fused {

constexpr int64_t kHalfRun = 512;  // elements that a caller should convert at a time, to and from memory on its stack

void widen_run(const c10::Half* from, float* to, int64_t n);
void narrow_run(const float* from, c10::Half* to, int64_t n);

// Rounds the values in place to those that float16 holds; `halves` is room for n.
TORCH_FUSED_INLINE void round_run(float* values, c10::Half* halves, int64_t n) {
  narrow_run(values, halves, n);
  widen_run(halves, values, n);
}

}  // namespace torch_fused
