// The gradient of a parameter that every row uses: each threadgroup leaves the part of its rows, and a second launch
// adds those up, because no threadgroup may read what another one of the same launch wrote.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

namespace torch_fused {

// Threadgroups of the first launch, of so many threads: enough to fill a GPU, and few parts to add up.
inline int64_t partial_sums(int64_t rows, int64_t threads) {
  return std::min<int64_t>(rows, threads > 256 ? 256 : 512);
}

// sums[j], of any GPU dtype, becomes the sum of column j of `partial`, a dense float32 matrix.
void column_sum_gpu(const at::Tensor& partial, const at::Tensor& sums);

}  // namespace torch_fused
