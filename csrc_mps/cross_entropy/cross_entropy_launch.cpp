// Cross entropy on a GPU: operands, kernel, grid and parameters.
#include "../common/checks.h"
#include "../common/row_shape.h"
#include "../common/rows.h"
#include "../common/torch_functions.h"
#include "../runtime/launch.h"
#include "cross_entropy.h"
#include "cross_entropy_classes_params.h"
#include "cross_entropy_params.h"

namespace torch_fused {

using at::Tensor;

Tensor cross_entropy_gpu(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& scale,
                         int64_t ignore_index, double label_smoothing, double z_loss) {
  check_cross_entropy(logits, target, scale, {ignore_index, label_smoothing, z_loss});
  const int64_t rows = logits.size(0), cols = logits.size(1);
  const Tensor losses = empty(target.sizes(), logits.options().dtype(at::kFloat));
  if (rows == 0) return losses;
  const Rows x = as_rows(logits, rows, cols);
  const Tensor targets = target.contiguous(), scales = scale ? scale->contiguous() : targets;
  const CrossEntropyParams params{x.stride,
                                  ignore_index,
                                  kernel_size("cross_entropy_", "classes", cols),
                                  rows_aligned(x.tensor, x.stride),
                                  scale.has_value(),
                                  scale && scale->dim() == 1,
                                  static_cast<float>(label_smoothing),
                                  static_cast<float>(z_loss)};
  static KernelSet kernels("cross_entropy", "cross_entropy");
  const int64_t threads = std::max<int64_t>(32, row_shape(cols, logits.element_size()).threads);
  launch(kernels(logits), rows, threads, {x.tensor, targets, scales, losses}, params);
  if (scale && !x.tensor.is_same(logits)) logits.copy_(x.tensor);
  return losses;
}

namespace {

// Few threads, of which each loads four packs at once: so the rows of a whole chunk are under way together.
void launch_chunk(KernelSet& kernels, const Tensor& logits, at::TensorList tensors, bool per_row, ClassChunk chunk,
                  const CrossEntropyOptions& options) {
  const int64_t cols = chunk.end - chunk.begin;
  const CrossEntropyClassesParams params{options.ignore_index,
                                         static_cast<uint32_t>(chunk.begin),
                                         static_cast<uint32_t>(cols),
                                         static_cast<uint32_t>(logits.size(1)),
                                         kernel_size("linear_cross_entropy", "classes", chunk.classes),
                                         per_row,
                                         static_cast<float>(options.label_smoothing),
                                         static_cast<float>(options.z_loss),
                                         0};
  const int64_t threads = row_shape(cols, logits.element_size(), kMostPacks).threads;
  launch(kernels(logits), logits.size(0), threads, tensors, params);
}

}  // namespace

void cross_entropy_sums_gpu(const Tensor& logits, const Tensor& target, const Tensor& sums, const Tensor& losses,
                            ClassChunk chunk, const CrossEntropyOptions& options) {
  static KernelSet kernels("cross_entropy_classes", "cross_entropy_sums");
  launch_chunk(kernels, logits, {logits, target, sums, losses}, false, chunk, options);
}

void cross_entropy_gradient_gpu(const Tensor& logits, const Tensor& target, const Tensor& sums, const Tensor& scale,
                                ClassChunk chunk, const CrossEntropyOptions& options) {
  static KernelSet kernels("cross_entropy_classes", "cross_entropy_gradient");
  launch_chunk(kernels, logits, {logits, target, sums, scale}, scale.dim() > 0, chunk, options);
}

}  // namespace torch_fused
