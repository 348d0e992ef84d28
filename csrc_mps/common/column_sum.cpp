#include "column_sum.h"

#include "../runtime/launch.h"
#include "dtype.h"

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
  launch("column_sum", "column_sum_" + dtype_name(sums), (partial.size(1) + kColumns - 1) / kColumns, kMaxThreads,
         {partial, sums}, params);
}

}  // namespace torch_fused
