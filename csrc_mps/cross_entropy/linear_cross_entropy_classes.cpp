// linear_cross_entropy in chunks of classes: one pass over them for the losses, and one back for the gradients.
//
// The weight's gradient is written from the last class down. Until then its memory holds logits: those of a chunk that
// begins at a class may take the gradients of all classes before it. So chunks become smaller from the last to the
// first; where they would become too small, their logits have memory of their own. Those of the last chunk, which are
// still there after the first pass, are not computed again.
#include <algorithm>

#include "../common/torch_functions.h"
#include "linear_cross_entropy.h"
#include "linear_cross_entropy_products.h"

namespace torch_fused {
namespace {

using at::Tensor;

// Classes of a chunk are multiples of kTile, as products are made of tiles; rows of its logits are whole packs.
constexpr int64_t kTile = 128, kPack = 8;
// Logits of a chunk in memory of its own, beside the weight's gradient.
constexpr int64_t kFewLogits = int64_t{1} << 20;
// Where there is no such gradient: few enough logits to stay in a GPU's cache from one step to the next, and enough
// classes for their products to take longer than the launches do.
constexpr int64_t kOwnLogits = int64_t{1} << 24, kOwnClasses = 4096;
// Classes whose logits may be computed once more, if they are at most one of so many.
constexpr int64_t kSmallPart = 4;

int64_t whole(int64_t size, int64_t unit) {
  return (size + unit - 1) / unit * unit;
}

// Classes of a chunk in memory of its own. Beside the weight's gradient, that is no more than the hidden states' takes.
int64_t own_classes(int64_t rows, int64_t features, bool beside_gradient) {
  const int64_t enough =
      beside_gradient ? std::max(kFewLogits / rows, features) : std::max(kOwnLogits / rows, kOwnClasses);
  return std::max(enough / kTile * kTile, kTile);
}

class ByClasses {
 public:
  ByClasses(const HeadLoss& of, std::optional<int64_t> own)
      : of_(of),
        own_(std::min(own.value_or(own_classes(rows_, features_, of.needs.weight)), classes_)),
        losses_(empty({rows_}, of.hidden.options().dtype(at::kFloat))),
        sums_(empty({rows_, 4}, losses_.options())),
        grad_weight_(empty({of.needs.weight ? classes_ : 0, features_}, of.weight.options())),
        grad_bias_(empty({of.needs.bias ? classes_ : 0}, of.weight.options())) {}

  Gradients run() {
    sum_all();
    Tensor grad_hidden = differentiate_all();
    return {losses_, grad_hidden, grad_weight_, grad_bias_};
  }

 private:
  // Classes of the chunk that ends at `end`, if its logits are in the weight's gradient: rows * classes elements of
  // them have to fit into features * (end - classes).
  int64_t fitting(int64_t end) const { return features_ * end / (features_ + rows_) / kTile * kTile; }
  bool fits(int64_t end) const { return of_.needs.weight && fitting(end) >= own_; }
  int64_t begin_of(int64_t end) const { return std::max<int64_t>(end - (fits(end) ? fitting(end) : own_), 0); }

  Tensor memory_for(int64_t end) {
    if (fits(end)) return grad_weight_.view({-1});
    if (!buffer_.defined()) buffer_ = empty({rows_ * whole(own_, kPack)}, of_.hidden.options());
    return buffer_;
  }

  void compute_logits(int64_t begin, int64_t end, const Tensor& memory) {
    const int64_t stride = whole(end - begin, kPack);
    logits_ = memory.narrow(0, 0, rows_ * stride).view({rows_, stride});
    const std::optional<Tensor> bias = of_.bias ? of_.bias->narrow(0, begin, end - begin) : of_.bias;
    multiply_logits(logits_.narrow(1, 0, end - begin), of_.hidden, of_.weight.narrow(0, begin, end - begin), bias);
  }

  // The logits become their gradient.
  Tensor differentiate(int64_t begin, int64_t end) {
    cross_entropy_gradient_gpu(logits_, of_.target, sums_, *of_.scale, {begin, end, classes_}, of_.options);
    return logits_.narrow(1, 0, end - begin);
  }

  // All chunks as long as the last one, except for the first.
  void sum_all() {
    const int64_t chunk = classes_ - begin_of(classes_);
    for (int64_t begin = 0, end = (classes_ - 1) % chunk + 1; begin < classes_; begin = end, end += chunk) {
      compute_logits(begin, end, memory_for(classes_));
      cross_entropy_sums_gpu(logits_, of_.target, sums_, losses_, {begin, end, classes_}, of_.options);
    }
  }

  // Returns the hidden states' gradient.
  Tensor differentiate_all() {
    ProductSum sum({of_.needs.hidden ? rows_ : 0, features_}, of_.hidden.options(), begin_of(classes_) == 0);
    Tensor grad_hidden;
    for (int64_t end = classes_, begin = 0; of_.needs.any() && end > 0; end = begin) {
      begin = begin_of(end);
      if (end < classes_) {  // those of the last chunk are there
        const bool starts_own = !fits(end) && !buffer_.defined();
        if (starts_own && of_.needs.hidden) grad_hidden = finish_hidden(sum, end);
        compute_logits(begin, end, memory_for(end));
      }
      const Tensor gradient = differentiate(begin, end);
      const auto part = [&](const Tensor& tensor) { return tensor.narrow(0, begin, end - begin); };
      if (of_.needs.hidden && !grad_hidden.defined()) sum.add(gradient, part(of_.weight));
      if (of_.needs.weight) multiply(part(grad_weight_), gradient.t(), of_.hidden);
      if (of_.needs.bias) part(grad_bias_).copy_(gradient.sum(0, false, at::kFloat));
    }
    logits_.reset();
    buffer_.reset();
    return grad_hidden.defined() ? grad_hidden : sum.result();
  }

  // Adds all that is left to the sum, and rounds it while the weight's gradient still has room for that: then its
  // float32 memory is free before logits get their own. Returns nothing if that saves no memory or takes long.
  Tensor finish_hidden(ProductSum& sum, int64_t classes) {
    const int64_t chunk = features_ * classes / rows_ / kPack * kPack;
    if (own_ > features_ || classes < rows_ || classes > classes_ / kSmallPart || chunk == 0) return {};
    const Tensor memory = grad_weight_.view({-1});
    for (int64_t begin = 0; begin < classes; begin += chunk) {
      const int64_t end = std::min(begin + chunk, classes);
      compute_logits(begin, end, memory);
      sum.add(differentiate(begin, end), of_.weight.narrow(0, begin, end - begin));
    }
    return sum.result(memory);
  }

  const HeadLoss& of_;
  const int64_t rows_ = of_.hidden.size(0), features_ = of_.hidden.size(1), classes_ = of_.weight.size(0);
  const int64_t own_;  // classes of a chunk in memory of its own
  const Tensor losses_, sums_, grad_weight_, grad_bias_;
  Tensor buffer_, logits_;
};

}  // namespace

Gradients losses_by_classes(const HeadLoss& of, std::optional<int64_t> own) {
  return ByClasses(of, own).run();
}

}  // namespace torch_fused
