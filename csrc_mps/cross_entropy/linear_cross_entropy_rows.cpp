// linear_cross_entropy in chunks of rows: the losses and gradients of each chunk at once.
#include <ATen/core/Tensor.h>
#include <ATen/ops/index_select.h>

#include <algorithm>

#include "../common/autograd.h"
#include "../common/torch_functions.h"
#include "linear_cross_entropy.h"
#include "linear_cross_entropy_products.h"

namespace torch_fused {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kChunks = 8;
// Rows below which a product takes longer than reading the weight does. On a CPU 256 rows are faster than 128: so many
// of a chunk of kFewLogits.
constexpr int64_t kLeastCpuRows = 128, kEnoughCpuRows = 256, kLeastGpuRows = 512, kFewLogits = int64_t{1} << 24;
// On a GPU each chunk after the first also reads and writes the sum of the weight's gradients, which takes as long as
// the products of some hundred rows: up to so many rows, a chunk is a quarter of all.
constexpr int64_t kFewGpuChunks = 4, kEnoughGpuRows = 1024;

int64_t chunk_rows(const HeadLoss& of) {
  const int64_t rows = of.hidden.size(0), classes = of.weight.size(0);
  const int64_t least = of.hidden.is_cpu()
                            ? std::clamp(kFewLogits / classes, kLeastCpuRows, kEnoughCpuRows)
                            : std::clamp((rows + kFewGpuChunks - 1) / kFewGpuChunks, kLeastGpuRows, kEnoughGpuRows);
  const int64_t chunk = std::min(rows, std::max((rows + kChunks - 1) / kChunks, least));
  if (of.needs.weight && of.weight.element_size() == 2) {
    // The sum in float32 may take more than all logits do.
    const int64_t whole = 2 * rows, split = 2 * chunk + 4 * of.weight.size(1);
    if (whole <= split) return rows;
  }
  return chunk;
}

Tensor cross_entropy(const Tensor& logits, const Tensor& target, const OptionalTensor& scale,
                     const CrossEntropyOptions& options) {
  static const auto op = find_op<decltype(cross_entropy_cpu)>("torch_fused::cross_entropy_");
  return op.call(logits, target, scale, options.ignore_index, options.label_smoothing, options.z_loss);
}

Gradients losses_of_all(const HeadLoss& of) {
  const Tensor &hidden = of.hidden, &weight = of.weight;
  const int64_t rows = hidden.size(0), chunk = chunk_rows(of);
  const auto wide = hidden.options().dtype(loss_dtype(hidden));
  const Tensor losses = empty({rows}, wide);
  const Tensor grad_hidden = empty({of.needs.hidden ? rows : 0, hidden.size(1)}, hidden.options());
  ProductSum grad_weight({of.needs.weight ? weight.size(0) : 0, weight.size(1)}, weight.options(), chunk >= rows);
  const Tensor grad_bias = zeros({of.needs.bias ? weight.size(0) : 0}, wide);
  Tensor buffer = empty({chunk, weight.size(0)}, hidden.options());
  for (int64_t begin = 0; begin < rows; begin += chunk) {
    const int64_t length = std::min(chunk, rows - begin);
    const auto part = [&](const Tensor& tensor) { return tensor.narrow(0, begin, length); };
    const Tensor logits = buffer.narrow(0, 0, length);
    multiply_logits(logits, part(hidden), weight, of.bias);
    const bool per_row = of.scale && of.scale->dim() > 0;
    const OptionalTensor scale = per_row ? part(*of.scale) : of.scale;
    part(losses).copy_(cross_entropy(logits, part(of.target), scale, of.options));
    if (of.needs.hidden) multiply(part(grad_hidden), logits, weight, of.scale_of_products);
    if (of.needs.weight) grad_weight.add(logits.t(), part(hidden), of.scale_of_products);
    if (of.needs.bias) grad_bias.add_(logits.sum(0, false, grad_bias.scalar_type()));
  }
  buffer.reset();
  grad_bias.mul_(of.scale_of_products);
  return {losses, grad_hidden, grad_weight.result(), grad_bias.to(hidden.scalar_type())};
}

}  // namespace

// Without the rows that have no loss. Only the CPU knows how many there are without waiting for a device.
Gradients losses_by_rows(const HeadLoss& of) {
  const int64_t rows = of.hidden.size(0);
  const Tensor kept = of.hidden.is_cpu() ? of.target.ne(of.options.ignore_index).nonzero().view({-1}) : Tensor();
  if (!kept.defined() || kept.numel() == rows) return losses_of_all(of);
  const auto select = [&](const Tensor& tensor) { return tensor.index_select(0, kept); };
  HeadLoss of_kept = of;
  of_kept.hidden = select(of.hidden);
  of_kept.target = select(of.target);
  if (of.scale && of.scale->dim() > 0) of_kept.scale = select(*of.scale);
  auto [losses, grad_hidden, grad_weight, grad_bias] = losses_of_all(of_kept);
  const Tensor all_losses = zeros({rows}, losses.options()).index_copy_(0, kept, losses);
  if (of.needs.hidden) grad_hidden = zeros(of.hidden.sizes(), of.hidden.options()).index_copy_(0, kept, grad_hidden);
  return {all_losses, grad_hidden, grad_weight, grad_bias};
}

}  // namespace torch_fused
