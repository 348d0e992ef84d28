// linear_cross_entropy in chunks of classes: one pass over them for the losses, and one back for the gradients.
#include <algorithm>

#include "../common/torch_functions.h"
#include "linear_cross_entropy.h"
#include "linear_cross_entropy_products.h"

namespace torch_fused {
namespace {

using at::Tensor;

// Logits of a chunk: few enough to stay in a GPU's cache from one step to the next. Classes of one: enough for its
// products to take longer than their launches do. They are multiples of kTile, as the products are made of tiles.
constexpr int64_t kLogits = int64_t{1} << 24, kLeastClasses = 4096, kTile = 128;

int64_t chunk_classes(int64_t rows, int64_t classes) {
  const int64_t all = (classes + kTile - 1) / kTile * kTile;
  return std::min(all, std::max(kLogits / rows / kTile * kTile, kLeastClasses));
}

// Until the weight's gradient is written, it has room for the logits of some chunks, those before the last one, one
// after the other from its beginning. Gradients are written from the last class down, so there are as many as end
// before their own part of the gradient begins: if the first and the last one do, all between do.
int64_t kept_chunks(int64_t rows, int64_t features, int64_t last) {
  const auto fits = [&](int64_t i, int64_t kept) { return (i + 1) * rows <= (last - kept + i) * features; };
  int64_t kept = 0;
  while (fits(0, kept + 1) && fits(kept, kept + 1)) ++kept;
  return kept;
}

}  // namespace

Gradients losses_by_classes(const HeadLoss& of, std::optional<int64_t> chunk_or_none) {
  const Tensor &hidden = of.hidden, &weight = of.weight;
  const int64_t rows = hidden.size(0), features = hidden.size(1), classes = weight.size(0);
  const int64_t chunk = chunk_or_none.value_or(chunk_classes(rows, classes)), last = (classes - 1) / chunk;
  const int64_t first_kept = last - (of.needs.weight ? kept_chunks(rows, features, last) : 0);
  const Tensor losses = empty({rows}, hidden.options().dtype(at::kFloat));
  const Tensor sums = empty({rows, 4}, losses.options());
  const Tensor grad_weight = empty({of.needs.weight ? classes : 0, features}, weight.options());
  const Tensor grad_bias = empty({of.needs.bias ? classes : 0}, weight.options());
  Tensor buffer = empty({rows, chunk}, hidden.options());
  const auto part = [&](const Tensor& tensor, int64_t i) {
    return tensor.narrow(0, i * chunk, std::min(chunk, classes - i * chunk));
  };
  const auto logits_of = [&](int64_t i) {
    if (i < first_kept || i == last) return buffer.narrow(1, 0, std::min(chunk, classes - i * chunk));
    return grad_weight.view({-1}).narrow(0, (i - first_kept) * rows * chunk, rows * chunk).view({rows, chunk});
  };
  const auto compute_logits = [&](int64_t i) {
    const Tensor logits = logits_of(i);
    multiply_logits(logits, hidden, part(weight, i), of.bias ? part(*of.bias, i) : of.bias);
    return logits;
  };
  for (int64_t i = 0; i <= last; ++i) {
    cross_entropy_sums_gpu(compute_logits(i), of.target, sums, losses, {i * chunk, classes}, of.options);
  }

  ProductSum grad_hidden({of.needs.hidden ? rows : 0, features}, hidden.options(), last == 0);
  for (int64_t i = last; of.needs.any() && i >= 0; --i) {
    const Tensor logits = i < first_kept ? compute_logits(i) : logits_of(i);
    cross_entropy_gradient_gpu(logits, of.target, sums, *of.scale, {i * chunk, classes}, of.options);
    if (of.needs.hidden) grad_hidden.add(logits, part(weight, i));
    if (of.needs.weight) multiply(part(grad_weight, i), logits.t(), hidden);
    if (of.needs.bias) part(grad_bias, i).copy_(logits.sum(0, false, at::kFloat));
  }
  buffer.reset();
  return {losses, grad_hidden.result(), grad_weight, grad_bias};
}

}  // namespace torch_fused
