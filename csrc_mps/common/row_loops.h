// How a loop over an op's rows is compiled, and shared among threads. `Args<T>` is what one call of it needs.
#pragma once

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "rows.h"
#include "simd.h"

// run(args, begin, end) for rows begin .. end - 1: loop(args, begin, end), compiled for every instruction set.
#define TORCH_FUSED_LOOP(Args, loop)                                        \
  TORCH_FUSED_SIMD void run(const Args& args, int64_t begin, int64_t end) { \
    loop(args, begin, end);                                                 \
  }

// The same for every element type.
#define TORCH_FUSED_LOOPS(Args, loop)     \
  TORCH_FUSED_LOOP(Args<float>, loop)     \
  TORCH_FUSED_LOOP(Args<double>, loop)    \
  TORCH_FUSED_LOOP(Args<c10::Half>, loop) \
  TORCH_FUSED_LOOP(Args<c10::BFloat16>, loop)

namespace torch_fused {

// Runs all `count` rows of so many elements.
template <class Args>
void run_parallel(const Args& args, int64_t count, int64_t elements_each) {
  at::parallel_for(0, count, row_grain(elements_each), [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

}  // namespace torch_fused
