// The loss of a language model's head, F.cross_entropy(F.linear(hidden, weight, bias), target), in chunks of its
// logits, which become their gradient in place: schema, checks, the choice of chunks, autograd, autocast.
#include <ATen/TensorOperators.h>
#include <ATen/core/PythonFallbackKernel.h>
#include <ATen/ops/ones.h>

#include <string>
#include <string_view>
#include <vector>

#include "../common/autograd.h"
#include "../common/checks.h"
#include "../common/registration.h"
#include "../common/torch_functions.h"
#include "linear_cross_entropy.h"

TORCH_LIBRARY_FRAGMENT(torch_fused, m) {
  m.def(
      "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor target, Tensor? bias=None, *, int ignore_index=-100, "
      "float label_smoothing=0.0, str reduction='mean', float z_loss=0.0) -> Tensor");
  // The loss, and the gradients of hidden, weight and bias that are needed for an incoming `grad`, absent for 1. Where
  // classes come in chunks, `own` is how many one has whose logits have memory of their own.
  m.def(
      "_linear_cross_entropy_gradients(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor? grad, "
      "int ignore_index, float label_smoothing, str reduction, float z_loss, bool need_hidden, bool need_weight, "
      "bool need_bias, int? own=None) -> (Tensor, Tensor, Tensor, Tensor)");
}

namespace torch_fused {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr char kOp[] = "linear_cross_entropy";

// ---- checks ---------------------------------------------------------------------------------------------------------

void check(const Tensor& hidden, const Tensor& weight, const Tensor& target, const OptionalTensor& bias,
           const OptionalTensor& grad, const CrossEntropyOptions& options, std::string_view reduction) {
  check_dtype(kOp, "hidden", hidden);
  TORCH_CHECK(hidden.dim() >= 1, kOp, ": hidden must have the shape (..., features), got ", hidden.sizes());
  TORCH_CHECK(weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) == hidden.size(-1), kOp,
              ": weight must have the shape (classes, ", hidden.size(-1), "), with a class at least, got ",
              weight.sizes());
  check_alike(kOp, "weight", weight, "hidden", hidden);
  check_target(kOp, target, hidden.sizes().slice(0, hidden.dim() - 1), "hidden", hidden);
  if (bias) {
    TORCH_CHECK(bias->sizes() == weight.sizes().slice(0, 1), kOp, ": bias must have the shape [", weight.size(0),
                "], got ", bias->sizes());
    check_alike(kOp, "bias", *bias, "hidden", hidden);
  }
  check_options(kOp, options);
  TORCH_CHECK(reduction == "mean" || reduction == "sum" || reduction == "none", kOp,
              ": reduction must be 'mean', 'sum' or 'none', got '", reduction, "'");
  if (grad) {
    const at::IntArrayRef sizes = reduction == "none" ? target.sizes() : at::IntArrayRef();
    TORCH_CHECK(grad->sizes() == sizes && grad->scalar_type() == loss_dtype(hidden), kOp, ": grad must have the shape ",
                sizes, " and dtype ", loss_dtype(hidden), " of the loss, got ", grad->sizes(), " of ",
                grad->scalar_type());
    TORCH_CHECK(grad->device() == hidden.device(), kOp, ": grad must be on hidden's device ", hidden.device(), ", got ",
                grad->device());
  }
}

// ---- losses and gradients -------------------------------------------------------------------------------------------

// Half types on an NVIDIA GPU go by classes. In float32 the logits' second product takes longer than what it saves; on
// MPS products take so long in all types.
bool goes_by_classes(const Tensor& hidden) {
  return (hidden.is_cuda() || (hidden.is_cpu() && emulating())) && hidden.element_size() == 2 && hidden.size(0) > 0;
}

Gradients losses_of(const HeadLoss& of, bool by_classes, std::optional<int64_t> own) {
  try {
    if (by_classes) return losses_by_classes(of, own);
  } catch (const LibraryUnavailable& error) {
    note_fallback(kOp, error.what());
  }
  return losses_by_rows(of);
}

Gradients gradients(const Tensor& hidden, const Tensor& weight, const Tensor& target, const OptionalTensor& bias,
                    const OptionalTensor& grad, const CrossEntropyOptions& options, std::string_view reduction,
                    Needs needs, std::optional<int64_t> own = {}) {
  check(hidden, weight, target, bias, grad, options, reduction);
  TORCH_CHECK(!own || *own > 0, kOp, ": a chunk must have a class at least, got ", *own);
  if (target.is_cpu() && !emulating()) check_classes(kOp, target, weight.size(0), options.ignore_index);
  const auto wide = hidden.options().dtype(loss_dtype(hidden));
  HeadLoss of{hidden.reshape({target.numel(), hidden.size(-1)}),
              weight,
              target.reshape({-1}).contiguous(),
              bias,
              std::nullopt,
              options,
              needs};
  const bool by_classes = goes_by_classes(of.hidden);
  Tensor count;
  if (reduction == "mean") count = of.target.ne(options.ignore_index).sum().to(wide.dtype().toScalarType());
  if (needs.any()) {
    OptionalTensor scale = grad;
    if (reduction == "none" && grad) scale = grad->reshape({-1}).contiguous();
    if (count.defined()) {
      const Tensor rows_of_all = count.clamp_min(1);  // without any the gradients are 0
      scale = scale ? *scale / rows_of_all : rows_of_all.reciprocal();
    }
    // In bfloat16 a number that multiplies all alike is rounded with the logits' gradients, in all of them the same
    // way. A product takes it unrounded, if the host knows it.
    const bool is_known = hidden.is_cpu() && !by_classes;
    if (scale && scale->dim() == 0 && reduction != "none" && is_known && hidden.scalar_type() == at::kBFloat16) {
      of.scale_of_products = scale->item<double>();
      scale.reset();
    }
    of.scale = scale ? *scale : at::ones({}, wide);
  }
  auto [losses, grad_hidden, grad_weight, grad_bias] = losses_of(of, by_classes, own);
  Tensor loss = reduction == "none" ? losses.view(target.sizes()) : losses.sum();
  if (count.defined()) loss = loss / count;
  return {loss, needs.hidden ? grad_hidden.view(hidden.sizes()) : grad_hidden, grad_weight, grad_bias};
}

// ---- the ops --------------------------------------------------------------------------------------------------------

Gradients linear_cross_entropy_gradients(const Tensor& hidden, const Tensor& weight, const Tensor& target,
                                         const OptionalTensor& bias, const OptionalTensor& grad, int64_t ignore_index,
                                         double label_smoothing, std::string_view reduction, double z_loss,
                                         bool need_hidden, bool need_weight, bool need_bias,
                                         std::optional<int64_t> own) {
  return gradients(hidden, weight, target, bias, grad, {ignore_index, label_smoothing, z_loss}, reduction,
                   {need_hidden, need_weight, need_bias}, own);
}

Tensor linear_cross_entropy(const Tensor& hidden, const Tensor& weight, const Tensor& target,
                            const OptionalTensor& bias, int64_t ignore_index, double label_smoothing,
                            std::string_view reduction, double z_loss) {
  return std::get<0>(
      gradients(hidden, weight, target, bias, std::nullopt, {ignore_index, label_smoothing, z_loss}, reduction, {}));
}

// ---- autograd and autocast ------------------------------------------------------------------------------------------

Tensor call_linear_cross_entropy(const Tensor& hidden, const Tensor& weight, const Tensor& target,
                                 const OptionalTensor& bias, int64_t ignore_index, double label_smoothing,
                                 std::string_view reduction, double z_loss) {
  static const auto op = find_op<decltype(linear_cross_entropy)>("torch_fused::linear_cross_entropy");
  return op.call(hidden, weight, target, bias, ignore_index, label_smoothing, reduction, z_loss);
}

// Whether the number in a tensor can be looked at: it is in this memory, and nobody records what is done with it.
bool is_one(const Tensor& number) {
  if (!number.is_cpu() || number.unsafeGetTensorImpl()->is_python_dispatch() ||
      number.key_set().has(c10::DispatchKey::Functionalize) || c10::impl::TorchDispatchModeTLS::any_modes_set()) {
    return false;
  }
  return number.item<double>() == 1;
}

// The gradient times the factor, in place.
void scale_by(const Tensor& gradient, const Tensor& factor) {
  static const auto op = find_op<decltype(scale_cpu)>("torch_fused::_scale_");
  at::AutoDispatchBelowADInplaceOrView below;
  op.call(gradient, factor);
}

struct LinearCrossEntropyFunction : torch::autograd::Function<LinearCrossEntropyFunction> {
  static constexpr const char* op = kOp;

  // One pass makes the loss and its gradients, where the incoming gradient is a factor. In float16 that factor, the
  // scale of the loss, keeps the gradients of the logits in range: they wait for it, and so do those of many losses.
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& hidden, const Tensor& weight,
                        const Tensor& target, const OptionalTensor& bias, int64_t ignore_index, double label_smoothing,
                        std::string_view reduction, double z_loss) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({hidden, weight, target, bias.value_or(Tensor())});
    auto& data = ctx->saved_data;
    data["ignore_index"] = ignore_index;
    data["label_smoothing"] = label_smoothing;
    data["reduction"] = std::string(reduction);
    data["z_loss"] = z_loss;
    data["need_hidden"] = hidden.requires_grad();
    data["need_weight"] = weight.requires_grad();
    data["need_bias"] = bias && bias->requires_grad();
    if (reduction == "none" || hidden.scalar_type() == at::kHalf) {
      return call_linear_cross_entropy(hidden, weight, target, bias, ignore_index, label_smoothing, reduction, z_loss);
    }
    auto [loss, grad_hidden, grad_weight, grad_bias] = call_gradients(ctx, hidden, weight, target, bias, std::nullopt);
    data["gradients"] = std::vector<Tensor>{grad_hidden, grad_weight, grad_bias};
    return loss;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    auto& data = ctx->saved_data;
    std::vector<Tensor> found;
    // They are handed on, not copied: a second backward pass, or one that is differentiated, makes its own.
    const bool batched = grads[0].key_set().has(c10::DispatchKey::Batched) || in_transform();
    if (data.count("gradients") && !at::GradMode::is_enabled() && !batched && !has_tangent(grads[0])) {
      found = data["gradients"].toTensorVector();
      data.erase("gradients");
      if (!is_one(grads[0])) {
        for (const Tensor& gradient : found) scale_by(gradient, grads[0]);
      }
    } else {
      const auto saved = ctx->get_saved_variables();
      const OptionalTensor bias = saved[3].defined() ? OptionalTensor(saved[3]) : std::nullopt;
      auto [loss, hidden, weight, of_bias] = call_gradients(ctx, saved[0], saved[1], saved[2], bias, grads[0]);
      found = {hidden, weight, of_bias};
    }
    const auto needed = [&](const char* name, size_t i) { return data[name].toBool() ? found[i] : Tensor(); };
    return {needed("need_hidden", 0),
            needed("need_weight", 1),
            Tensor(),
            needed("need_bias", 2),
            Tensor(),
            Tensor(),
            Tensor(),
            Tensor()};
  }

 private:
  static Gradients call_gradients(torch::autograd::AutogradContext* ctx, const Tensor& hidden, const Tensor& weight,
                                  const Tensor& target, const OptionalTensor& bias, const OptionalTensor& grad) {
    static const auto gradients_op =
        find_op<decltype(linear_cross_entropy_gradients)>("torch_fused::_linear_cross_entropy_gradients");
    auto& data = ctx->saved_data;
    return gradients_op.call(hidden, weight, target, bias, grad, data["ignore_index"].toInt(),
                             data["label_smoothing"].toDouble(), data["reduction"].toStringView(),
                             data["z_loss"].toDouble(), data["need_hidden"].toBool(), data["need_weight"].toBool(),
                             data["need_bias"].toBool(), std::nullopt);
  }
};

// As torch's own linear: in autocast's dtype.
template <c10::DispatchKey key, c10::DeviceType device>
Tensor linear_cross_entropy_autocast(const Tensor& hidden, const Tensor& weight, const Tensor& target,
                                     const OptionalTensor& bias, int64_t ignore_index, double label_smoothing,
                                     std::string_view reduction, double z_loss) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const auto cast = [](const Tensor& tensor) { return autocast_to(autocast_dtype(device), tensor, device); };
  return call_linear_cross_entropy(cast(hidden), cast(weight), target, bias ? OptionalTensor(cast(*bias)) : bias,
                                   ignore_index, label_smoothing, reduction, z_loss);
}

}  // namespace
}  // namespace torch_fused

// The same code on every device: what differs is in torch's products and in cross_entropy_.
#define LINEAR_CROSS_ENTROPY(key)                                                                              \
  TORCH_LIBRARY_IMPL(torch_fused, key, m) {                                                                    \
    m.impl("linear_cross_entropy", torch_fused::linear_cross_entropy);                                         \
    m.impl("_linear_cross_entropy_gradients", torch_fused::linear_cross_entropy_gradients);                    \
  }                                                                                                            \
  TORCH_LIBRARY_IMPL(torch_fused, Autocast##key, m) {                                                          \
    m.impl("linear_cross_entropy",                                                                             \
           torch_fused::linear_cross_entropy_autocast<c10::DispatchKey::Autocast##key, c10::DeviceType::key>); \
  }
LINEAR_CROSS_ENTROPY(CPU)
LINEAR_CROSS_ENTROPY(CUDA)
LINEAR_CROSS_ENTROPY(MPS)
TORCH_LIBRARY_IMPL(torch_fused, Autograd, m) {
  using namespace torch_fused;
  m.impl("linear_cross_entropy", Differentiable<LinearCrossEntropyFunction, decltype(linear_cross_entropy)>::call);
  m.impl("_linear_cross_entropy_gradients", differentiable_by_reference());
}
