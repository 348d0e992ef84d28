// Layer norm: schema, checks, autograd, autocast and the CPU kernels.
#include "layer_norm.h"

#include <ATen/Dispatch.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "../common/autograd.h"
#include "../common/checks.h"
#include "../common/convert.h"
#include "../common/half_runs.h"
#include "../common/prefetch.h"
#include "../common/registration.h"
#include "../common/row_loops.h"
#include "../common/row_sums.h"
#include "../common/torch_functions.h"

TORCH_LIBRARY_FRAGMENT(torch_fused, m) {
  m.def(
      "layer_norm(Tensor input, int[] normalized_shape, Tensor? weight=None, Tensor? bias=None, float eps=1e-5) -> "
      "Tensor");
  m.def(
      "layer_norm_backward(Tensor grad, Tensor x, int[] normalized_shape, Tensor? weight, float eps, "
      "bool need_weight_grad, bool need_bias_grad) -> (Tensor, Tensor)");
}

namespace torch_fused {

using at::IntArrayRef;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- checks ---------------------------------------------------------------------------------------------------------

namespace {

void check_parameter(const char* op, const char* name, const OptionalTensor& parameter, const Tensor& input,
                     IntArrayRef normalized_shape) {
  if (!parameter) return;
  TORCH_CHECK(parameter->sizes() == normalized_shape, op, ": ", name, " must have the shape ", normalized_shape,
              ", got ", parameter->sizes());
  check_alike(op, name, *parameter, "input", input);
}

}  // namespace

LayerNorm check_layer_norm(const char* op, const Tensor& input, IntArrayRef normalized_shape,
                           const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  check_dtype(op, "input", input);
  const auto dims = static_cast<int64_t>(normalized_shape.size());
  TORCH_CHECK(dims > 0 && dims <= input.dim() && input.sizes().slice(input.dim() - dims) == normalized_shape, op,
              ": normalized_shape must be the last dimensions of input, got ", normalized_shape, " for input of shape ",
              input.sizes());
  check_parameter(op, "weight", weight, input, normalized_shape);
  check_parameter(op, "bias", bias, input, normalized_shape);
  const int64_t cols = c10::multiply_integers(normalized_shape);
  return {cols ? input.numel() / cols : 0, cols, eps};
}

LayerNorm check_layer_norm_backward(const Tensor& grad, const Tensor& x, IntArrayRef normalized_shape,
                                    const OptionalTensor& weight, double eps) {
  check_grad("layer_norm_backward", "grad", grad, "x", x);
  return check_layer_norm("layer_norm_backward", x, normalized_shape, weight, std::nullopt, eps);
}

Tensor empty_parameter_grads(const Tensor& x, IntArrayRef normalized_shape, bool need_weight_grad,
                             bool need_bias_grad) {
  std::vector<int64_t> shape{need_weight_grad + need_bias_grad};
  shape.insert(shape.end(), normalized_shape.begin(), normalized_shape.end());
  return empty(shape, x.options());
}

// ---- CPU ------------------------------------------------------------------------------------------------------------

namespace {

// `values` in the type of the arithmetic, in `buffer` if they are not already; n times `absent` if there are none.
template <class T>
TORCH_FUSED_INLINE const wide_t<T>* widened(const T* values, int64_t n, wide_t<T> absent,
                                            std::vector<wide_t<T>>& buffer) {
  if constexpr (std::is_same_v<T, wide_t<T>>) {
    if (values) return values;
  }
  buffer.resize(n);
  wide_t<T>* wide = buffer.data();
  if (!values) {
    std::fill_n(wide, n, absent);
    return wide;
  }
  const auto* from = readable(values, n, wide);
  for (int64_t i = 0; i < n; ++i) wide[i] = widen(from[i]);
  return wide;
}

// Of the row times `unit`, which is 1 unless sums of its values would overflow. The mean is shift + rest, which is
// exact to more than one number of type W.
template <class W>
struct Moments {
  W unit, shift, rest, rstd;
  TORCH_FUSED_INLINE W normed(W x) const { return std::fma(std::fma(x, unit, -shift), rstd, -rest * rstd); }
};

// The unit of a row whose values are too large for their squares, and their sum, to be finite.
template <class W>
constexpr W kSmallUnit = std::is_same_v<W, float> ? W(0x1p-80) : W(0x1p-600);

// Calls find(values, unit) for the row's moments, once more with smaller values if sums have overflowed. `find` has to
// be inlined: as a function of its own it would be compiled for plain x86-64 only.
template <class W, class Find>
TORCH_FUSED_INLINE auto in_range(const W* x, int64_t n, const Find& find) {
  static thread_local std::vector<W> small;
  for (W unit = 1;; unit = kSmallUnit<W>) {
    const auto found = find(x, unit);
    if (found.rstd > 0 || unit != 1) return found;
    small.resize(n);
    for (int64_t i = 0; i < n; ++i) small[i] = x[i] * kSmallUnit<W>;
    x = small.data();
  }
}

// The mean of the row or, if it is long, of one block's worth of it, taken in stretches all over the row.
template <class W>
TORCH_FUSED_INLINE W rough_mean(const W* x, int64_t n) {
  const int64_t stretches = n <= kRowBlock ? 1 : 8, length = std::min(n, kRowBlock) / stretches;
  W sum = 0;
  for (int64_t k = 0; k < stretches; ++k) {
    const W* stretch = x + k * (n / stretches);
    sum += block_sums<1, W>(length, [=](int64_t i, int64_t j, W(*sums)[kRowStreams]) { sums[0][j] += stretch[i]; })[0];
  }
  return sum / static_cast<W>(length * stretches);
}

// From the sums of x - shift and of its square.
template <class W>
TORCH_FUSED_INLINE Moments<W> moments_of(W unit, W shift, W sum, W squares, const LayerNorm& norm) {
  const W count = static_cast<W>(norm.cols), rest = sum / count;
  const W variance = std::max(squares / count - rest * rest, W(0)), eps = static_cast<W>(norm.eps);
  if (unit != 1 && variance == 0) return {unit, shift, rest, 1 / (std::sqrt(eps) * unit)};  // all values are the same
  return {unit, shift, rest, 1 / std::sqrt(variance + eps * unit * unit)};
}

// One pass over memory, about a shift that is near the mean, so that little cancels.
template <class W>
TORCH_FUSED_INLINE Moments<W> row_moments(const W* row, const LayerNorm& norm) {
  return in_range(row, norm.cols, [&](const W* x, W unit) __attribute__((always_inline)) {
    const W shift = rough_mean(x, norm.cols);
    const auto [sum, squares] = row_sums<2, W>(norm.cols, [=](int64_t i, int64_t j, W(*sums)[kRowStreams]) {
      const W centred = x[i] - shift;
      sums[0][j] += centred;
      sums[1][j] = std::fma(centred, centred, sums[1][j]);
    });
    return moments_of(unit, shift, sum, squares, norm);
  });
}

// What a row's gradient needs: of g = dy * weight and n = (x - mean) * rstd, the means of g and g * n.
template <class W>
struct Slopes : Moments<W> {
  W mean_g, mean_gn;
};

template <class W>
TORCH_FUSED_INLINE Slopes<W> row_slopes(const W* dy, const W* row, const W* weight, const LayerNorm& norm) {
  return in_range(row, norm.cols, [&](const W* x, W unit) __attribute__((always_inline)) {
    const W shift = rough_mean(x, norm.cols);
    const auto [sum, squares, g, gc] = row_sums<4, W>(norm.cols, [=](int64_t i, int64_t j, W(*sums)[kRowStreams]) {
      const W centred = x[i] - shift, g = dy[i] * weight[i];
      sums[0][j] += centred;
      sums[1][j] = std::fma(centred, centred, sums[1][j]);
      sums[2][j] += g;
      sums[3][j] = std::fma(g, centred, sums[3][j]);
    });
    const Moments<W> m = moments_of(unit, shift, sum, squares, norm);
    const W count = static_cast<W>(norm.cols);
    return Slopes<W>{m, g / count, (gc - m.rest * g) * m.rstd / count};
  });
}

template <class T>
struct Forward {
  LayerNorm norm;
  const T* input;
  const T* weight;  // or null
  const T* bias;    // or null
  T* output;
  int64_t stride;
};

template <class T>
TORCH_FUSED_INLINE void forward_rows(const Forward<T>& a, int64_t begin, int64_t end) {
  static thread_local std::vector<wide_t<T>> weight_buffer, bias_buffer, row_buffer;
  const int64_t n = a.norm.cols;
  const wide_t<T>* w = widened(a.weight, n, wide_t<T>(1), weight_buffer);
  const wide_t<T>* b = widened(a.bias, n, wide_t<T>(0), bias_buffer);
  for (int64_t row = begin; row < end; ++row) {
    const wide_t<T>* x = widened(a.input + row * a.stride, n, wide_t<T>(0), row_buffer);
    T* y = a.output + row * n;
    const Moments<wide_t<T>> m = row_moments(x, a.norm);
    const bool ahead = n > kRowBlock && row + 1 < end && std::is_same_v<T, at::BFloat16>;
    const int64_t step = ahead ? kPrefetchRun : n;
    for (int64_t first = 0; first < n; first += step) {
      const int64_t count = std::min(n - first, step);
      if (ahead) prefetch(a.input + (row + 1) * a.stride + first, count);
      write_run(y + first, count, row_buffer.data() + first,  // in the place of x
                [=](int64_t i) { return std::fma(m.normed(x[first + i]), w[first + i], b[first + i]); });
    }
  }
}

template <class T>
struct Backward {
  LayerNorm norm;
  const T* grad;
  const T* x;
  const T* weight;  // or null
  T* grad_x;
  wide_t<T>* partial;  // one row per block: its part of the weight's gradient, then of the bias's, if they are needed
  int64_t grad_stride, x_stride, rows_per_block;
  bool need_weight_grad, need_bias_grad;
};

// With g = dy * weight and n = (x - mean) * rstd: dx = rstd * (g - mean(g) - n * mean(g * n)), dweight = sum of dy * n,
// dbias = sum of dy.
template <class T>
TORCH_FUSED_INLINE void backward_blocks(const Backward<T>& a, int64_t begin, int64_t end) {
  using W = wide_t<T>;
  static thread_local std::vector<W> weight_buffer, grad_buffer, row_buffer;
  const int64_t n = a.norm.cols;
  const W* w = widened(a.weight, n, W(1), weight_buffer);
  for (int64_t block = begin; block < end; ++block) {
    W* grad_weight = a.partial + block * n * (a.need_weight_grad + a.need_bias_grad);
    W* grad_bias = grad_weight + (a.need_weight_grad ? n : 0);
    const int64_t last = std::min((block + 1) * a.rows_per_block, a.norm.rows);
    for (int64_t row = block * a.rows_per_block; row < last; ++row) {
      const W* dy = widened(a.grad + row * a.grad_stride, n, W(0), grad_buffer);
      const W* x = widened(a.x + row * a.x_stride, n, W(0), row_buffer);
      T* dx = a.grad_x + row * n;
      const Slopes<W> m = row_slopes(dy, x, w, a.norm);
      const W rstd = m.rstd * m.unit;
      const bool ahead = n > kRowBlock && row + 1 < last;
      const int64_t step = ahead ? kPrefetchRun : kRowBlock;
      for (int64_t first = 0; first < n; first += step) {
        const int64_t past = std::min(n, first + step);
        if (ahead) {
          prefetch(a.grad + (row + 1) * a.grad_stride + first, past - first);
          prefetch(a.x + (row + 1) * a.x_stride + first, past - first);
        }
        W room[kRowBlock];
        write_run(dx + first, past - first, room, [=](int64_t j) {
          const int64_t i = first + j;
          return rstd * (dy[i] * w[i] - m.mean_g - m.normed(x[i]) * m.mean_gn);
        });
        if (a.need_weight_grad) {
          for (int64_t i = first; i < past; ++i) grad_weight[i] += dy[i] * m.normed(x[i]);
        }
        if (a.need_bias_grad) {
          for (int64_t i = first; i < past; ++i) grad_bias[i] += dy[i];
        }
      }
    }
  }
}

TORCH_FUSED_LOOPS(Forward, forward_rows)
TORCH_FUSED_LOOPS(Backward, backward_blocks)

}  // namespace

Tensor layer_norm_cpu(const Tensor& input, IntArrayRef normalized_shape, const OptionalTensor& weight,
                      const OptionalTensor& bias, double eps) {
  const LayerNorm norm = check_layer_norm("layer_norm", input, normalized_shape, weight, bias, eps);
  const Tensor output = empty(input.sizes(), input.options());
  if (input.numel() == 0) return output;
  const Rows x = as_rows(input, norm.rows, norm.cols);
  const Tensor w = weight ? weight->contiguous() : Tensor(), b = bias ? bias->contiguous() : Tensor();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "layer_norm", [&] {
    const Forward<scalar_t> args{norm,
                                 elements<const scalar_t>(x.tensor),
                                 weight ? elements<const scalar_t>(w) : nullptr,
                                 bias ? elements<const scalar_t>(b) : nullptr,
                                 elements<scalar_t>(output),
                                 x.stride};
    run_parallel(args, norm.rows, norm.cols);
  });
  return output;
}

std::tuple<Tensor, Tensor> layer_norm_backward_cpu(const Tensor& grad, const Tensor& x, IntArrayRef normalized_shape,
                                                   const OptionalTensor& weight, double eps, bool need_weight_grad,
                                                   bool need_bias_grad) {
  const LayerNorm norm = check_layer_norm_backward(grad, x, normalized_shape, weight, eps);
  const Tensor grad_x = empty(x.sizes(), x.options());
  const Tensor grad_params = empty_parameter_grads(x, normalized_shape, need_weight_grad, need_bias_grad);
  if (x.numel() == 0) return {grad_x, grad_params.zero_()};
  const Rows dy = as_rows(grad, norm.rows, norm.cols), values = as_rows(x, norm.rows, norm.cols);
  const Tensor w = weight ? weight->contiguous() : Tensor();
  const int64_t block_rows = rows_per_block(norm.rows), blocks = (norm.rows + block_rows - 1) / block_rows;
  const auto acc_type = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor partial = zeros({blocks, grad_params.numel()}, x.options().dtype(acc_type));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "layer_norm_backward", [&] {
    const Backward<scalar_t> args{norm,
                                  elements<const scalar_t>(dy.tensor),
                                  elements<const scalar_t>(values.tensor),
                                  weight ? elements<const scalar_t>(w) : nullptr,
                                  elements<scalar_t>(grad_x),
                                  elements<wide_t<scalar_t>>(partial),
                                  dy.stride,
                                  values.stride,
                                  block_rows,
                                  need_weight_grad,
                                  need_bias_grad};
    run_parallel(args, blocks, block_rows * norm.cols);
  });
  return {grad_x, partial.sum(0).to(x.scalar_type()).view(grad_params.sizes())};
}

// ---- autograd and autocast ------------------------------------------------------------------------------------------

namespace {

Tensor call_layer_norm(const Tensor& input, IntArrayRef normalized_shape, const OptionalTensor& weight,
                       const OptionalTensor& bias, double eps) {
  static const auto op = find_op<decltype(layer_norm_cpu)>("torch_fused::layer_norm");
  return op.call(input, normalized_shape, weight, bias, eps);
}

struct LayerNormFunction : torch::autograd::Function<LayerNormFunction> {
  static constexpr char op[] = "layer_norm";

  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& input, IntArrayRef normalized_shape,
                        const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({input, weight.value_or(Tensor())});
    ctx->saved_data["normalized_shape"] = normalized_shape;
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["eps"] = eps;
    return call_layer_norm(input, normalized_shape, weight, bias, eps);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    static const auto backward_op = find_op<decltype(layer_norm_backward_cpu)>("torch_fused::layer_norm_backward");
    const auto saved = ctx->get_saved_variables();
    const OptionalTensor weight = saved[1].defined() ? OptionalTensor(saved[1]) : std::nullopt;
    auto& data = ctx->saved_data;
    // An absent tensor is no edge, so the bias follows whatever is there.
    const bool need_weight_grad = weight && ctx->needs_input_grad(1);
    const bool need_bias_grad = data["has_bias"].toBool() && ctx->needs_input_grad(weight ? 2 : 1);
    auto [grad_x, grad_params] = backward_op.call(grads[0], saved[0], data["normalized_shape"].toIntVector(), weight,
                                                  data["eps"].toDouble(), need_weight_grad, need_bias_grad);
    return {grad_x, Tensor(), need_weight_grad ? grad_params[0] : Tensor(), need_bias_grad ? grad_params[-1] : Tensor(),
            Tensor()};
  }
};

// Under autocast, what torch does for its own layer_norm on GPUs: float32.
template <c10::DispatchKey key, c10::DeviceType device>
Tensor layer_norm_autocast(const Tensor& input, IntArrayRef normalized_shape, const OptionalTensor& weight,
                           const OptionalTensor& bias, double eps) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const auto cast = [](const OptionalTensor& tensor) {
    return tensor ? OptionalTensor(autocast_to(at::kFloat, *tensor, device)) : tensor;
  };
  return call_layer_norm(*cast(input), normalized_shape, cast(weight), cast(bias), eps);
}

}  // namespace
}  // namespace torch_fused

TORCH_LIBRARY_IMPL(torch_fused, Autograd, m) {
  using namespace torch_fused;
  m.impl("layer_norm", Differentiable<LayerNormFunction, decltype(layer_norm_cpu)>::call);
  m.impl("layer_norm_backward", differentiable_by_reference());
}
TORCH_LIBRARY_IMPL(torch_fused, AutocastCUDA, m) {
  m.impl("layer_norm", torch_fused::layer_norm_autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}
TORCH_LIBRARY_IMPL(torch_fused, AutocastMPS, m) {
  m.impl("layer_norm", torch_fused::layer_norm_autocast<c10::DispatchKey::AutocastMPS, c10::DeviceType::MPS>);
}

TORCH_FUSED_KERNELS(layer_norm)
TORCH_FUSED_KERNELS(layer_norm_backward)
