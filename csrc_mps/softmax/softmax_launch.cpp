// Softmax on a GPU: operands, kernel, grid and parameters of each launch.
#include "softmax.h"

#include <algorithm>

#include "../common/checks.h"
#include "../common/row_shape.h"
#include "../common/rows.h"
#include "../common/torch_functions.h"
#include "../runtime/launch.h"
#include "softmax_params.h"

namespace torch_fused {
namespace {

using at::Tensor;

constexpr int64_t kFewRows = 128;  // too few threadgroups to fill a GPU, if each takes a whole row
constexpr int64_t kChunk = 4096, kLongestChunk = 16384;  // columns
constexpr int64_t kMostChunks = 256, kChunkThreads = 256;
constexpr int64_t kEnoughChunks = 512;  // of all rows, to fill a GPU

void launch_chunked(const Rows& x, const Tensor& output, const SoftmaxShape& shape, SoftmaxParams params) {
  const auto chunks_of = [&](int64_t chunk) { return (shape.cols + chunk - 1) / chunk; };
  int64_t chunk = kChunk;
  while ((chunk < kLongestChunk && shape.rows * chunks_of(2 * chunk) >= kEnoughChunks) ||
         chunks_of(chunk) > kMostChunks) {
    chunk *= 2;
  }
  const int64_t chunks = chunks_of(chunk);
  params.chunk = static_cast<uint32_t>(chunk);
  params.chunks = static_cast<uint32_t>(chunks);
  const Tensor partial = empty({shape.rows, chunks, 2}, output.options().dtype(at::kFloat));
  static KernelSet chunk_kernels("softmax", "softmax_chunk"), finish_kernels("softmax", "softmax_finish");
  launch(chunk_kernels(output), shape.rows * chunks, kChunkThreads, {x.tensor, partial}, params);
  launch(finish_kernels(output), shape.rows * chunks, kChunkThreads, {x.tensor, partial, output}, params);
}

}  // namespace

Tensor softmax_gpu(const Tensor& input, std::optional<at::ScalarType> dtype) {
  const Tensor values = converted(input, dtype);
  const SoftmaxShape shape = check_softmax("softmax", "input", values);
  const Tensor output = empty(values.sizes(), values.options());
  if (output.numel() == 0) return output;
  const Rows x = as_rows(values, shape.rows, shape.cols);
  const RowShape row = row_shape(shape.cols, output.element_size(), 4, 128);
  const SoftmaxParams params{
      x.stride, 0, kernel_size("softmax", "columns", shape.cols), all_aligned({x, {output, shape.cols}}), 0, 1};
  if (row.packs == 0 && shape.rows < kFewRows) {
    launch_chunked(x, output, shape, params);
  } else {
    static KernelSet kernels("softmax", "softmax");
    launch(kernels(output, row.packs), shape.rows, row.threads, {x.tensor, output}, params);
  }
  return output;
}

Tensor softmax_backward_gpu(const Tensor& grad, const Tensor& output) {
  const SoftmaxShape shape = check_softmax_backward(grad, output);
  const Tensor grad_input = empty(output.sizes(), output.options());
  if (output.numel() == 0) return grad_input;
  const Rows dy = as_rows(grad, shape.rows, shape.cols), y = as_rows(output, shape.rows, shape.cols);
  const RowShape row = row_shape(shape.cols, output.element_size());
  const SoftmaxParams params{dy.stride,
                             y.stride,
                             kernel_size("softmax_backward", "columns", shape.cols),
                             all_aligned({dy, y, {grad_input, shape.cols}}),
                             0,
                             1};
  static KernelSet kernels("softmax", "softmax_backward");
  launch(kernels(output, row.packs), shape.rows, row.threads, {dy.tensor, y.tensor, grad_input}, params);
  return grad_input;
}

}  // namespace torch_fused
