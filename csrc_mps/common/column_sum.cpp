#include "column_sum.h"

#include <algorithm>

#include "../runtime/launch.h"

namespace torch_fused {
namespace {

// As in column_sum.metal.
struct ColumnSumParams {
  uint32_t rows, cols;
};
constexpr int64_t kColumns = 8;  // of a threadgroup

}  // namespace

void column_sum_gpu(const at::Tensor& partial, const at::Tensor& sums) {
  const ColumnSumParams params{static_cast<uint32_t>(partial.size(0)), static_cast<uint32_t>(partial.size(1))};
  // A thread a row and column, as far as there are threads; each column's sum is a simdgroup's.
  const int64_t threads = std::clamp((partial.size(0) * kColumns + 31) / 32 * 32, 32 * kColumns, kMaxThreads);
  static KernelSet kernels("column_sum", "column_sum");
  launch(kernels(sums), (partial.size(1) + kColumns - 1) / kColumns, threads, {partial, sums}, params);
}

}  // namespace torch_fused
