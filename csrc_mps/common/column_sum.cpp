#include "column_sum.h"

#include <algorithm>

#include "../runtime/launch.h"
#include "column_sum_params.h"

namespace torch_fused {
void column_sum_gpu(const at::Tensor& partial, const at::Tensor& sums) {
  const ColumnSumParams params{static_cast<uint32_t>(partial.size(0)), static_cast<uint32_t>(partial.size(1))};
  // A thread a row and column, as far as there are threads; each column's sum is a simdgroup's.
  const int64_t threads = std::clamp<int64_t>((partial.size(0) * COLUMNS + 31) / 32 * 32, 32 * COLUMNS, kMaxThreads);
  static KernelSet kernels("column_sum", "column_sum");
  launch(kernels(sums), (partial.size(1) + COLUMNS - 1) / COLUMNS, threads, {partial, sums}, params);
}

}  // namespace torch_fused
