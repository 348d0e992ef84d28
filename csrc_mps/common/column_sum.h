// The gradient of a parameter that every row uses: each threadgroup leaves the part of its rows, and a second launch
// adds those up, because no threadgroup may read what another one of the same launch wrote.
#pragma once

#include <ATen/core/Tensor.h>

namespace torch_fused {

constexpr int64_t kPartialSums = 256;  // threadgroups of the first launch: enough to fill a GPU

// sums[j], of any GPU dtype, becomes the sum of column j of `partial`, a dense float32 matrix.
void column_sum_gpu(const at::Tensor& partial, const at::Tensor& sums);

}  // namespace torch_fused
