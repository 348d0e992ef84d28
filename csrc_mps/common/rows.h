// Tensors seen as rows: the leading dimensions folded into one, the last `cols` elements dense.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <type_traits>

#include "torch_functions.h"

namespace torch_fused {

// A tensor's memory as T*. (Tensor's own accessor templates are exported under names that depend on torch's compiler.)
template <class T>
T* elements(const at::Tensor& tensor) {
  if constexpr (std::is_const_v<T>) {
    return static_cast<T*>(tensor.const_data_ptr());
  } else {
    return static_cast<T*>(tensor.mutable_data_ptr());
  }
}

struct Rows {
  at::Tensor tensor;  // keeps a copy alive, if one was needed
  int64_t stride;     // elements from row to row
};

// `tensor` as `count` rows of `cols` elements: read in place where one row stride reaches every row, else copied once.
inline Rows as_rows(const at::Tensor& tensor, int64_t count, int64_t cols) {
  if (tensor.is_contiguous()) return {tensor, cols};
  int64_t dim = tensor.dim() - 1, dense = 1;
  for (; dim >= 0 && dense < cols; --dim) {
    if (tensor.size(dim) != 1 && tensor.stride(dim) != dense) return {tensor.contiguous(), cols};
    dense *= tensor.size(dim);
  }
  if (count == 1) return {tensor, cols};
  int64_t stride = 0, rows = 1;
  for (; dim >= 0; --dim) {
    if (tensor.size(dim) == 1) continue;
    if (rows == 1) stride = tensor.stride(dim);
    if (tensor.stride(dim) != stride * rows) return {tensor.contiguous(), cols};
    rows *= tensor.size(dim);
  }
  return {tensor, stride};
}

// A dense result for rows of the last dimension: in the order of the tensor's dimensions, as torch's results are,
// unless that leaves the last one without a unit stride.
inline at::Tensor empty_rows_like(const at::Tensor& tensor) {
  const at::Tensor result = torch_fused::empty_like(tensor);  // not at::empty_like, if that is included
  if (tensor.dim() == 0 || result.size(-1) <= 1 || result.stride(-1) == 1) return result;
  return empty(tensor.sizes(), tensor.options());
}

// Rows of `cols` elements that a CPU thread should at least have: below that, waking one costs more than it saves.
inline int64_t row_grain(int64_t cols) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, cols));
}

// Rows whose part of a parameter's gradient is summed apart. It depends on their number only, so that the gradient does
// not depend on the number of threads; and few blocks come of it, as their sums are cleared before and added up after.
inline int64_t rows_per_block(int64_t rows) {
  return std::max<int64_t>(16, (rows + 31) / 32);
}

// Whether every row starts at a multiple of 16 bytes. On MPS the address is not visible, but a buffer's start is
// aligned.
inline bool rows_aligned(const at::Tensor& tensor, int64_t stride) {
  const int64_t size = static_cast<int64_t>(tensor.element_size());
  const int64_t address =
      tensor.is_mps() ? tensor.storage_offset() * size : reinterpret_cast<int64_t>(tensor.data_ptr());
  return address % 16 == 0 && stride * size % 16 == 0;
}

}  // namespace torch_fused
