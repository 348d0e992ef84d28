// The matrix products of linear_cross_entropy, and their sums over chunks.
#include "linear_cross_entropy_products.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <algorithm>

#include "../common/torch_functions.h"

namespace torch_fused {

using at::Tensor;

void multiply(const Tensor& result, const Tensor& left, const Tensor& right, double scale) {
  Tensor written = result;
  at::addmm_out(written, written, left, right, 0, scale);
}

void multiply_logits(const Tensor& logits, const Tensor& hidden, const Tensor& weight,
                     const std::optional<Tensor>& bias) {
  Tensor result = logits;
  if (bias) {
    at::addmm_out(result, *bias, hidden, weight.t());
  } else {
    at::mm_out(result, hidden, weight.t());
  }
}

ProductSum::ProductSum(at::IntArrayRef sizes, const at::TensorOptions& options, bool one_chunk)
    : dtype_(options.dtype().toScalarType()), wide_(!one_chunk && options.dtype().itemsize() == 2) {
  sum_ = empty(sizes, options.dtype(wide_ ? at::kFloat : dtype_));
}

void ProductSum::add(const Tensor& left, const Tensor& right, double scale) {
  const int beta = empty_ ? 0 : 1;
  empty_ = false;
  if (!wide_) {
    at::addmm_out(sum_, sum_, left, right, beta, scale);
  } else if (right.is_cuda()) {
    at::addmm_out(sum_, sum_, left, right, at::kFloat, beta, scale);
  } else {                           // torch has no product of half types with float32 results here
    constexpr int64_t kTile = 8192;  // rows of the sum
    const Tensor wide_right = right.to(at::kFloat);
    for (int64_t begin = 0; begin < sum_.size(0); begin += kTile) {
      const int64_t length = std::min(kTile, sum_.size(0) - begin);
      Tensor part = sum_.narrow(0, begin, length);
      at::addmm_out(part, part, left.narrow(0, begin, length).to(at::kFloat), wide_right, beta, scale);
    }
  }
}

Tensor ProductSum::result(const Tensor& memory) {
  if (empty_) sum_.zero_();
  if (!memory.defined()) return sum_.to(dtype_);
  const Tensor rounded = memory.narrow(0, 0, sum_.numel()).view(sum_.sizes()).copy_(sum_);
  sum_.reset();
  return rounded.clone();
}

}  // namespace torch_fused
