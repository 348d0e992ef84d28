// The sum of the squares of many tensors: schema, checks, autograd and the CPU kernel.
#include "sum_of_squares.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <algorithm>

#include "../common/autograd.h"
#include "../common/checks.h"
#include "../common/convert.h"
#include "../common/registration.h"
#include "../common/row_sums.h"
#include "../common/rows.h"
#include "../common/simd.h"

TORCH_LIBRARY_FRAGMENT(torch_fused, m) {
  m.def("sum_of_squares(Tensor[] tensors) -> Tensor");
}

namespace torch_fused {

using at::Tensor;
using at::TensorList;

std::vector<Tensor> check_sum_of_squares(TensorList tensors) {
  TORCH_CHECK(!tensors.empty(), "sum_of_squares: tensors must be at least one, got none");
  std::vector<Tensor> flat;
  flat.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    TORCH_CHECK(takes_dtype(tensor.scalar_type(), tensor), "sum_of_squares: tensors[", i, "]", dtypes_taken(tensor),
                tensor.scalar_type());
    TORCH_CHECK(tensor.device() == tensors[0].device(), "sum_of_squares: tensors[", i,
                "] must be on the device of tensors[0], ", tensors[0].device(), ", got ", tensor.device());
  }
  for (const Tensor& tensor : tensors) {
    if (tensor.numel() > 0) flat.push_back(tensor.is_non_overlapping_and_dense() ? tensor : tensor.contiguous());
  }
  return flat;
}

// ---- CPU ------------------------------------------------------------------------------------------------------------

namespace {

constexpr int64_t kChunk = 16384;  // elements per thread at a time

// Blocks of a row are summed in the type of the arithmetic, the blocks in double.
template <class T>
TORCH_FUSED_INLINE double sum_elements(const T* x, int64_t n) {
  using W = wide_t<T>;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kRowBlock) {
    total += block_sums<1, W>(std::min(n - begin, kRowBlock), [&](int64_t i, int64_t j, W(*sums)[kRowStreams]) {
      const W value = widen(x[begin + i]);
      sums[0][j] += value * value;
    })[0];
  }
  return total;
}

#define SQUARES_LOOP(T)                                    \
  TORCH_FUSED_SIMD double squares(const T* x, int64_t n) { \
    return sum_elements(x, n);                             \
  }
SQUARES_LOOP(double)
SQUARES_LOOP(float)
SQUARES_LOOP(at::Half)
SQUARES_LOOP(at::BFloat16)

}  // namespace

Tensor sum_of_squares_cpu(TensorList tensors) {
  const std::vector<Tensor> flat = check_sum_of_squares(tensors);
  struct Chunk {
    const Tensor* tensor;
    int64_t begin;
  };
  std::vector<Chunk> chunks;
  for (const Tensor& tensor : flat) {
    for (int64_t begin = 0; begin < tensor.numel(); begin += kChunk) chunks.push_back({&tensor, begin});
  }
  std::vector<double> sums(chunks.size());
  at::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const Tensor& tensor = *chunks[i].tensor;
      const int64_t begin = chunks[i].begin, count = std::min(kChunk, tensor.numel() - begin);
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, tensor.scalar_type(), "sum_of_squares",
                                      [&] { sums[i] = squares(elements<const scalar_t>(tensor) + begin, count); });
    }
  });
  double total = 0;  // in one order, for any number of threads
  for (const double sum : sums) total += sum;
  const bool wide =
      std::all_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return t.scalar_type() == at::kDouble; });
  return at::full({}, total, tensors[0].options().dtype(wide ? at::kDouble : at::kFloat));
}

// ---- autograd -------------------------------------------------------------------------------------------------------

namespace {

Tensor sum_of_squares_autograd(TensorList tensors) {
  for (const Tensor& tensor : tensors) check_not_differentiated("sum_of_squares", "tensors", tensor);
  static const auto op = find_op<decltype(sum_of_squares_cpu)>("torch_fused::sum_of_squares");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(tensors);
}

// Without tensors, torch cannot find a device and calls this.
Tensor sum_of_squares_of_none(TensorList tensors) {
  check_sum_of_squares(tensors);
  TORCH_CHECK_NOT_IMPLEMENTED(false, "sum_of_squares: tensors must be on the CPU, an Apple GPU or an NVIDIA GPU, got ",
                              tensors[0].device());
}

}  // namespace
}  // namespace torch_fused

TORCH_LIBRARY_IMPL(torch_fused, Autograd, m) {
  m.impl("sum_of_squares", torch_fused::sum_of_squares_autograd);
}
TORCH_LIBRARY_IMPL(torch_fused, CompositeExplicitAutograd, m) {
  m.impl("sum_of_squares", torch_fused::sum_of_squares_of_none);
}

TORCH_FUSED_KERNELS(sum_of_squares)
