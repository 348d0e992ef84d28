// RMS norm: schema, checks, autograd, autocast and the CPU kernels.
#include "rms_norm.h"

#include <ATen/Dispatch.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../common/autograd.h"
#include "../common/checks.h"
#include "../common/half_runs.h"
#include "../common/pairs.h"
#include "../common/registration.h"
#include "../common/row_loops.h"
#include "../common/sum.h"
#include "../common/torch_functions.h"

TORCH_LIBRARY_FRAGMENT(torch_fused, m) {
  m.def(
      "rms_norm(Tensor input, int[] normalized_shape, Tensor? weight=None, float? eps=None, *, "
      "str casting_mode=\"torch\", float weight_offset=0.0) -> Tensor");
  m.def(
      "add_rms_norm(Tensor input, Tensor residual, Tensor weight, float eps=1e-6, *, str casting_mode=\"llama\", "
      "float weight_offset=0.0) -> (Tensor, Tensor)");
  m.def(
      "rms_norm_backward(Tensor grad, Tensor? grad_sum, Tensor x, int[] normalized_shape, Tensor? weight, float? eps, "
      "str casting_mode, float weight_offset, bool need_weight_grad) -> (Tensor, Tensor)");
}

namespace torch_fused {

using at::IntArrayRef;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- checks ---------------------------------------------------------------------------------------------------------

RmsNorm check_rms_norm(const char* op, const Tensor& input, IntArrayRef normalized_shape, const OptionalTensor& weight,
                       std::optional<double> eps, std::string_view casting_mode, double weight_offset) {
  const bool llama = is_llama(op, casting_mode);
  check_dtype(op, "input", input);
  const auto dims = static_cast<int64_t>(normalized_shape.size());
  TORCH_CHECK(dims > 0 && dims <= input.dim() && input.sizes().slice(input.dim() - dims) == normalized_shape, op,
              ": normalized_shape must be the last dimensions of input, got ", normalized_shape, " for input of shape ",
              input.sizes());
  if (weight) {
    TORCH_CHECK(weight->sizes() == normalized_shape, op, ": weight must have the shape ", normalized_shape, ", got ",
                weight->sizes());
    check_alike(op, "weight", *weight, "input", input);
  }
  // As torch does: the epsilon of the type the arithmetic is done in.
  const double smallest = input.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                                             : std::numeric_limits<float>::epsilon();
  const int64_t cols = c10::multiply_integers(normalized_shape);
  return {cols ? input.numel() / cols : 0, cols, eps.value_or(smallest), weight_offset, llama};
}

void check_add_rms_norm(const Tensor& input, const Tensor& residual, const Tensor& weight) {
  check_same_shape("add_rms_norm", "residual", residual, "input", input);
  check_alike("add_rms_norm", "residual", residual, "input", input);
  TORCH_CHECK(weight.dim() > 0, "add_rms_norm: weight must have at least one dimension, got a scalar");
}

RmsNorm check_rms_norm_backward(const Tensor& grad, const OptionalTensor& grad_sum, const Tensor& x,
                                IntArrayRef normalized_shape, const OptionalTensor& weight, std::optional<double> eps,
                                std::string_view casting_mode, double weight_offset) {
  check_grad("rms_norm_backward", "grad", grad, "x", x);
  if (grad_sum) check_grad("rms_norm_backward", "grad_sum", *grad_sum, "x", x);
  return check_rms_norm("rms_norm_backward", x, normalized_shape, weight, eps, casting_mode, weight_offset);
}

// ---- CPU ------------------------------------------------------------------------------------------------------------

namespace {

template <class T>
struct Forward {
  RmsNorm norm;
  const T* input;
  const T* residual;  // or null
  const T* weight;    // or null
  T* output;
  T* sum;  // input + residual, if there is one
  int64_t input_stride, residual_stride;
};

// The weight as the rows are multiplied by it: with the offset, and in "llama" mode rounded to its type.
template <class T>
TORCH_FUSED_INLINE const wide_t<T>* effective_weight(const T* weight, const RmsNorm& norm) {
  static thread_local std::vector<wide_t<T>> buffer;
  buffer.resize(norm.cols);
  const auto offset = static_cast<wide_t<T>>(norm.weight_offset);
  wide_t<T>* w = buffer.data();
  if (!weight) {
    std::fill_n(w, norm.cols, wide_t<T>(1));
  } else {
    const auto* from = readable(weight, norm.cols, w);
    for (int64_t i = 0; i < norm.cols; ++i) w[i] = widen(from[i]);
  }
  if (weight && offset != 0) {
    for (int64_t i = 0; i < norm.cols; ++i) w[i] = norm.llama ? round_to<T>(w[i] + offset) : w[i] + offset;
  }
  return w;
}

template <class T>
TORCH_FUSED_INLINE wide_t<T> inverse_rms(wide_t<T> squares, const RmsNorm& norm) {
  return 1 / std::sqrt(squares / static_cast<wide_t<T>>(norm.cols) + static_cast<wide_t<T>>(norm.eps));
}

template <class T>
struct Squares {
  static constexpr bool in_pairs = kInPairs<T>;
  const T* x;
  TORCH_FUSED_INLINE wide_t<T> one(int64_t i) const { return widen(x[i]) * widen(x[i]); }
  TORCH_FUSED_INLINE Pair pair(int64_t i) const {
    const Pair value = load_pair(x + i);
    return {value.first * value.first, value.second * value.second};
  }
};

// Squares of sum = x + residual, which is stored on the way, rounded to T because it is a result of its own.
template <class T>
struct AddedSquares {
  static constexpr bool in_pairs = kInPairs<T>;
  const T* __restrict x;
  const T* __restrict residual;
  T* __restrict sum;
  TORCH_FUSED_INLINE wide_t<T> one(int64_t i) const {
    const wide_t<T> value = round_to<T>(widen(x[i]) + widen(residual[i]));
    sum[i] = narrow_exact<T>(value);
    return value * value;
  }
  TORCH_FUSED_INLINE Pair pair(int64_t i) const {
    const Pair a = load_pair(x + i), b = load_pair(residual + i);
    const Pair value = round_pair({a.first + b.first, a.second + b.second});
    store_pair(sum + i, value);
    return {value.first * value.first, value.second * value.second};
  }
};

// y = x * scale * weight, with the roundings of the casting mode.
template <bool llama, class T>
TORCH_FUSED_INLINE void scale_row(const T* x, const wide_t<T>* w, wide_t<T> scale, T* y, int64_t begin, int64_t n) {
  for (int64_t i = begin; i < n; ++i) {
    const wide_t<T> normed = widen(x[i]) * scale;
    y[i] = narrow<T>((llama ? round_to<T>(normed) : normed) * w[i]);
  }
}

// The same for pairs: `split` is the even weights, then the odd ones.
template <bool llama>
TORCH_FUSED_INLINE void scale_pairs(const at::BFloat16* x, const float* split, float scale, at::BFloat16* y,
                                    int64_t pairs) {
  for (int64_t i = 0; i < pairs; ++i) {
    const Pair value = load_pair(x + 2 * i);
    Pair normed{value.first * scale, value.second * scale};
    if (llama) normed = round_pair(normed);
    store_pair(y + 2 * i, round_pair({normed.first * split[i], normed.second * split[pairs + i]}));
  }
}

TORCH_FUSED_INLINE const float* split_pairs(const float* w, int64_t pairs) {
  static thread_local std::vector<float> buffer;
  buffer.resize(2 * pairs);
  for (int64_t i = 0; i < pairs; ++i) {
    buffer[i] = w[2 * i];
    buffer[pairs + i] = w[2 * i + 1];
  }
  return buffer.data();
}

template <bool llama, class T>
TORCH_FUSED_INLINE void forward_rows(const Forward<T>& a, int64_t begin, int64_t end) {
  const int64_t n = a.norm.cols, pairs = kInPairs<T> ? n / 2 : 0;
  const wide_t<T>* w = effective_weight(a.weight, a.norm);
  const wide_t<T>* split = nullptr;
  if constexpr (kInPairs<T>) split = split_pairs(w, pairs);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = a.input + row * a.input_stride;
    T* y = a.output + row * n;
    wide_t<T> squares;
    if (a.residual) {
      T* sum = a.sum + row * n;
      squares = row_sum<wide_t<T>>(n, AddedSquares<T>{x, a.residual + row * a.residual_stride, sum});
      x = sum;
    } else {
      squares = row_sum<wide_t<T>>(n, Squares<T>{x});
    }
    const wide_t<T> scale = inverse_rms<T>(squares, a.norm);
    if constexpr (kInPairs<T>) scale_pairs<llama>(x, split, scale, y, pairs);
    scale_row<llama>(x, w, scale, y, 2 * pairs, n);
  }
}

template <bool llama>
TORCH_FUSED_INLINE void forward_rows(const Forward<at::Half>& a, int64_t begin, int64_t end) {
  static thread_local std::vector<float> row_buffer, residual_buffer;
  const int64_t n = a.norm.cols;
  const float* w = effective_weight(a.weight, a.norm);
  row_buffer.resize(n);
  residual_buffer.resize(n);
  float* x = row_buffer.data();
  float* residual = residual_buffer.data();
  for (int64_t row = begin; row < end; ++row) {
    at::Half* y = a.output + row * n;
    widen_run(a.input + row * a.input_stride, x, n);
    if (a.residual) {
      widen_run(a.residual + row * a.residual_stride, residual, n);
      for (int64_t i = 0; i < n; ++i) x[i] += residual[i];
      round_run(x, a.sum + row * n, n);
    }
    const float scale = inverse_rms<at::Half>(row_sum<float>(n, Squares<float>{x}), a.norm);
    for (int64_t i = 0; i < n; ++i) x[i] *= scale;
    if (llama) round_run(x, y, n);
    for (int64_t i = 0; i < n; ++i) x[i] *= w[i];
    narrow_run(x, y, n);
  }
}

template <class T>
struct Backward {
  RmsNorm norm;
  const T* grad;
  const T* grad_sum;  // or null
  const T* x;
  const T* weight;  // or null
  T* grad_x;
  wide_t<T>* partial;  // one row per block: its part of the weight's gradient; or null
  int64_t grad_stride, grad_sum_stride, x_stride, rows_per_block;
};

// With g = dy * weight and s = rsqrt(mean(x^2) + eps): dx = s * (g - x * s^2 * mean(g * x)), dweight = sum of dy * x *
// s.
template <class T>
TORCH_FUSED_INLINE void backward_blocks(const Backward<T>& a, int64_t begin, int64_t end) {
  const int64_t n = a.norm.cols;
  const wide_t<T>* w = effective_weight(a.weight, a.norm);
  wide_t<T>*const grad_room = row_room<T, 0>(n), *const x_room = row_room<T, 1>(n), *const room = row_room<T, 2>(n);
  for (int64_t block = begin; block < end; ++block) {
    wide_t<T>* partial = a.partial ? a.partial + block * n : nullptr;
    const int64_t last = std::min((block + 1) * a.rows_per_block, a.norm.rows);
    for (int64_t row = block * a.rows_per_block; row < last; ++row) {
      const auto* dy = readable(a.grad + row * a.grad_stride, n, grad_room);
      const auto* x = readable(a.x + row * a.x_stride, n, x_room);
      T* dx = a.grad_x + row * n;
      const auto squares = row_sum<wide_t<T>>(n, Squares<std::decay_t<decltype(*x)>>{x});
      const wide_t<T> scale = inverse_rms<T>(squares, a.norm);
      const auto dot = row_sum<wide_t<T>>(n, Terms{[=](int64_t i) { return widen(dy[i]) * w[i] * widen(x[i]); }});
      wide_t<T> slope = scale * scale * dot / static_cast<wide_t<T>>(n);
      if (!std::isfinite(dot)) {  // the sum of g * x overflows where that of g * normed need not
        const auto term = [=](int64_t i) { return widen(dy[i]) * w[i] * (widen(x[i]) * scale); };
        slope = scale * row_sum<wide_t<T>>(n, Terms{term}) / static_cast<wide_t<T>>(n);
      }
      if (partial) {
        for (int64_t i = 0; i < n; ++i) partial[i] += widen(dy[i]) * (widen(x[i]) * scale);
      }
      const auto slanted = [=](int64_t i) { return scale * (widen(dy[i]) * w[i] - widen(x[i]) * slope); };
      if (a.grad_sum) {
        const auto* extra = readable(a.grad_sum + row * a.grad_sum_stride, n, room);
        write_run(dx, n, room, [=](int64_t i) { return widen(extra[i]) + slanted(i); });
      } else {
        write_run(dx, n, room, slanted);
      }
    }
  }
}

template <class T>
TORCH_FUSED_INLINE void forward_rows(const Forward<T>& a, int64_t begin, int64_t end) {
  if constexpr (kRounds<T>) {
    if (a.norm.llama) return forward_rows<true>(a, begin, end);
  }
  forward_rows<false>(a, begin, end);
}

TORCH_FUSED_LOOPS(Forward, forward_rows)
TORCH_FUSED_LOOPS(Backward, backward_blocks)

std::tuple<Tensor, Tensor> forward_cpu(const RmsNorm& norm, const Tensor& input, const OptionalTensor& residual,
                                       const OptionalTensor& weight) {
  const Tensor output = empty(input.sizes(), input.options());
  const Tensor sum = residual ? empty(input.sizes(), input.options()) : Tensor();
  if (input.numel() == 0) return {output, sum};
  const Rows x = as_rows(input, norm.rows, norm.cols);
  const Rows r = residual ? as_rows(*residual, norm.rows, norm.cols) : Rows{Tensor(), 0};
  const Tensor w = weight ? weight->contiguous() : Tensor();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "rms_norm", [&] {
    const Forward<scalar_t> args{norm,
                                 elements<const scalar_t>(x.tensor),
                                 residual ? elements<const scalar_t>(r.tensor) : nullptr,
                                 weight ? elements<const scalar_t>(w) : nullptr,
                                 elements<scalar_t>(output),
                                 residual ? elements<scalar_t>(sum) : nullptr,
                                 x.stride,
                                 r.stride};
    run_parallel(args, norm.rows, norm.cols);
  });
  return {output, sum};
}

}  // namespace

Tensor rms_norm_cpu(const Tensor& input, IntArrayRef normalized_shape, const OptionalTensor& weight,
                    std::optional<double> eps, std::string_view casting_mode, double weight_offset) {
  const RmsNorm norm = check_rms_norm("rms_norm", input, normalized_shape, weight, eps, casting_mode, weight_offset);
  return std::get<0>(forward_cpu(norm, input, std::nullopt, weight));
}

std::tuple<Tensor, Tensor> add_rms_norm_cpu(const Tensor& input, const Tensor& residual, const Tensor& weight,
                                            double eps, std::string_view casting_mode, double weight_offset) {
  check_add_rms_norm(input, residual, weight);
  const RmsNorm norm = check_rms_norm("add_rms_norm", input, weight.sizes(), weight, eps, casting_mode, weight_offset);
  return forward_cpu(norm, input, residual, weight);
}

std::tuple<Tensor, Tensor> rms_norm_backward_cpu(const Tensor& grad, const OptionalTensor& grad_sum, const Tensor& x,
                                                 IntArrayRef normalized_shape, const OptionalTensor& weight,
                                                 std::optional<double> eps, std::string_view casting_mode,
                                                 double weight_offset, bool need_weight_grad) {
  const RmsNorm norm =
      check_rms_norm_backward(grad, grad_sum, x, normalized_shape, weight, eps, casting_mode, weight_offset);
  const Tensor grad_x = empty(x.sizes(), x.options());
  if (x.numel() == 0) return {grad_x, zeros(need_weight_grad ? normalized_shape : IntArrayRef{0}, x.options())};
  const Rows dy = as_rows(grad, norm.rows, norm.cols), values = as_rows(x, norm.rows, norm.cols);
  const Rows extra = grad_sum ? as_rows(*grad_sum, norm.rows, norm.cols) : Rows{Tensor(), 0};
  const Tensor w = weight ? weight->contiguous() : Tensor();
  const int64_t block_rows = rows_per_block(norm.rows), blocks = (norm.rows + block_rows - 1) / block_rows;
  const auto acc_type = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor partial = zeros({need_weight_grad ? blocks : 0, norm.cols}, x.options().dtype(acc_type));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "rms_norm_backward", [&] {
    const Backward<scalar_t> args{norm,
                                  elements<const scalar_t>(dy.tensor),
                                  grad_sum ? elements<const scalar_t>(extra.tensor) : nullptr,
                                  elements<const scalar_t>(values.tensor),
                                  weight ? elements<const scalar_t>(w) : nullptr,
                                  elements<scalar_t>(grad_x),
                                  need_weight_grad ? elements<wide_t<scalar_t>>(partial) : nullptr,
                                  dy.stride,
                                  extra.stride,
                                  values.stride,
                                  block_rows};
    run_parallel(args, blocks, block_rows * norm.cols);
  });
  if (!need_weight_grad) return {grad_x, empty({0}, x.options())};
  return {grad_x, partial.sum(0).to(x.scalar_type()).view(normalized_shape)};
}

// ---- autograd -------------------------------------------------------------------------------------------------------

namespace {

Tensor call_rms_norm(const Tensor& input, IntArrayRef normalized_shape, const OptionalTensor& weight,
                     std::optional<double> eps, std::string_view casting_mode, double weight_offset) {
  static const auto op = find_op<decltype(rms_norm_cpu)>("torch_fused::rms_norm");
  return op.call(input, normalized_shape, weight, eps, casting_mode, weight_offset);
}

std::tuple<Tensor, Tensor> call_add_rms_norm(const Tensor& input, const Tensor& residual, const Tensor& weight,
                                             double eps, std::string_view casting_mode, double weight_offset) {
  static const auto op = find_op<decltype(add_rms_norm_cpu)>("torch_fused::add_rms_norm");
  return op.call(input, residual, weight, eps, casting_mode, weight_offset);
}

// Saves x and the weight; the backward pass finds the scale again from x, which it has to read anyway.
void save(torch::autograd::AutogradContext* ctx, const Tensor& x, IntArrayRef normalized_shape,
          const OptionalTensor& weight, std::optional<double> eps, std::string_view casting_mode,
          double weight_offset) {
  ctx->save_for_backward({x, weight.value_or(Tensor())});
  ctx->saved_data["normalized_shape"] = normalized_shape;
  ctx->saved_data["has_weight"] = weight.has_value();
  ctx->saved_data["eps"] = eps;
  ctx->saved_data["casting_mode"] = std::string(casting_mode);
  ctx->saved_data["weight_offset"] = weight_offset;
}

std::tuple<Tensor, Tensor> call_backward(torch::autograd::AutogradContext* ctx, const Tensor& grad,
                                         const OptionalTensor& grad_sum, bool need_weight_grad) {
  static const auto op = find_op<decltype(rms_norm_backward_cpu)>("torch_fused::rms_norm_backward");
  const auto saved = ctx->get_saved_variables();
  const OptionalTensor weight = saved[1].defined() ? OptionalTensor(saved[1]) : std::nullopt;
  auto& data = ctx->saved_data;
  auto [grad_x, grad_weight] = op.call(grad, grad_sum, saved[0], data["normalized_shape"].toIntVector(), weight,
                                       data["eps"].toOptional<double>(), data["casting_mode"].toStringView(),
                                       data["weight_offset"].toDouble(), need_weight_grad);
  return {grad_x, need_weight_grad ? grad_weight : Tensor()};
}

struct RmsNormFunction : torch::autograd::Function<RmsNormFunction> {
  static constexpr char op[] = "rms_norm";

  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& input, IntArrayRef normalized_shape,
                        const OptionalTensor& weight, std::optional<double> eps, std::string_view casting_mode,
                        double weight_offset) {
    at::AutoDispatchBelowADInplaceOrView below;
    save(ctx, input, normalized_shape, weight, eps, casting_mode, weight_offset);
    return call_rms_norm(input, normalized_shape, weight, eps, casting_mode, weight_offset);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const bool has_weight = ctx->saved_data["has_weight"].toBool();  // an absent tensor is no edge
    auto [grad_x, grad_weight] = call_backward(ctx, grads[0], std::nullopt, has_weight && ctx->needs_input_grad(1));
    return {grad_x, Tensor(), grad_weight, Tensor(), Tensor(), Tensor()};
  }
};

struct AddRmsNormFunction : torch::autograd::Function<AddRmsNormFunction> {
  static constexpr char op[] = "add_rms_norm";

  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const Tensor& input,
                                                const Tensor& residual, const Tensor& weight, double eps,
                                                std::string_view casting_mode, double weight_offset) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [output, sum] = call_add_rms_norm(input, residual, weight, eps, casting_mode, weight_offset);
    save(ctx, sum, weight.sizes(), weight, eps, casting_mode, weight_offset);
    ctx->set_materialize_grads(false);
    return {output, sum};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    Tensor grad_x = grads[1], grad_weight;
    if (grads[0].defined()) {
      const OptionalTensor grad_sum = grads[1].defined() ? OptionalTensor(grads[1]) : std::nullopt;
      std::tie(grad_x, grad_weight) = call_backward(ctx, grads[0], grad_sum, ctx->needs_input_grad(2));
    }
    return {grad_x, grad_x, grad_weight, Tensor(), Tensor(), Tensor()};
  }
};

// Under autocast, what this torch does for its own rms_norm: float32 on GPUs, but not in every version. "llama" keeps
// the model's roundings.
template <c10::DispatchKey key, c10::DeviceType device>
Tensor rms_norm_autocast(const Tensor& input, IntArrayRef normalized_shape, const OptionalTensor& weight,
                         std::optional<double> eps, std::string_view casting_mode, double weight_offset) {
  static const bool torch_casts =
      c10::Dispatcher::singleton().findSchemaOrThrow("aten::rms_norm", "").hasKernelForDispatchKey(key);
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  if (!torch_casts || casting_mode == "llama") {
    return call_rms_norm(input, normalized_shape, weight, eps, casting_mode, weight_offset);
  }
  const auto cast = [](const Tensor& tensor) { return autocast_to(at::kFloat, tensor, device); };
  return call_rms_norm(cast(input), normalized_shape, weight ? OptionalTensor(cast(*weight)) : weight, eps,
                       casting_mode, weight_offset);
}

}  // namespace
}  // namespace torch_fused

TORCH_LIBRARY_IMPL(torch_fused, Autograd, m) {
  using namespace torch_fused;
  m.impl("rms_norm", Differentiable<RmsNormFunction, decltype(rms_norm_cpu)>::call);
  m.impl("add_rms_norm", Differentiable<AddRmsNormFunction, decltype(add_rms_norm_cpu)>::call);
  m.impl("rms_norm_backward", differentiable_by_reference());
}
TORCH_LIBRARY_IMPL(torch_fused, AutocastCUDA, m) {
  m.impl("rms_norm", torch_fused::rms_norm_autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}
TORCH_LIBRARY_IMPL(torch_fused, AutocastMPS, m) {
  m.impl("rms_norm", torch_fused::rms_norm_autocast<c10::DispatchKey::AutocastMPS, c10::DeviceType::MPS>);
}

TORCH_FUSED_KERNELS(rms_norm)
TORCH_FUSED_KERNELS(add_rms_norm)
TORCH_FUSED_KERNELS(rms_norm_backward)
