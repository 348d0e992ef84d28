// The sum of squares on a GPU: 28 tensors per launch, then one launch for the total.
#include "sum_of_squares.h"

#include <algorithm>
#include <map>

#include "../common/checks.h"
#include "../common/rows.h"
#include "../common/torch_functions.h"
#include "../runtime/launch.h"
#include "sum_of_squares_params.h"

namespace torch_fused {
namespace {

using at::Tensor;
using at::TensorList;

int64_t threadgroups_of(const Tensor& tensor) {
  const int64_t chunk = SUM_THREADS * SUM_PACKS * 16 / static_cast<int64_t>(tensor.element_size());
  return (tensor.numel() + chunk - 1) / chunk;
}

// Returns the number of sums that it writes from `first_partial` on.
int64_t launch_some(TensorList some, const Tensor& partial, int64_t first_partial) {
  SumOfSquaresParams params{};
  params.first_partial = kernel_size("sum_of_squares", "stretches", first_partial);
  std::fill(std::begin(params.first), std::end(params.first), UINT32_MAX);
  std::vector<Tensor> tensors;
  int64_t threadgroups = 0;
  for (size_t i = 0; i < SUMMED; ++i) {
    tensors.push_back(some[std::min(i, some.size() - 1)]);
    if (i >= some.size()) continue;
    params.numel[i] = some[i].numel();
    params.first[i] = kernel_size("sum_of_squares", "stretches", threadgroups);
    params.aligned |= static_cast<uint32_t>(rows_aligned(some[i], 0)) << i;
    threadgroups += threadgroups_of(some[i]);
  }
  tensors.push_back(partial);
  static KernelSet kernels("sum_of_squares", "sum_of_squares");
  launch(kernels(some[0]), threadgroups, SUM_THREADS, tensors, params);
  return threadgroups;
}

}  // namespace

Tensor sum_of_squares_gpu(TensorList tensors) {
  const std::vector<Tensor> flat = check_sum_of_squares(tensors);
  const auto options = tensors[0].options().dtype(at::kFloat);
  if (flat.empty()) return zeros({}, options);
  std::map<at::ScalarType, std::vector<Tensor>> by_dtype;
  int64_t count = 0;
  for (const Tensor& tensor : flat) {
    by_dtype[tensor.scalar_type()].push_back(tensor);
    count += threadgroups_of(tensor);
  }
  const Tensor partial = empty({count}, options), total = empty({}, options);
  int64_t done = 0;
  for (const auto& [dtype, group] : by_dtype) {
    for (size_t i = 0; i < group.size(); i += SUMMED) {
      done += launch_some(TensorList(group).slice(i, std::min<size_t>(SUMMED, group.size() - i)), partial, done);
    }
  }
  static const Kernel& kernel = find_kernel("sum_of_squares", "sum_of_squares_total");
  launch(kernel, 1, TOTAL_THREADS, {partial, total}, TotalParams{kernel_size("sum_of_squares", "stretches", count), 0});
  return total;
}

}  // namespace torch_fused
