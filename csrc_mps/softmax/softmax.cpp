// Softmax over the last dimension: schema, checks, autograd, autocast and the CPU kernels.

// Fused multiply-adds where the machine has them: half the work of exp's polynomial.
#pragma GCC optimize("fp-contract=fast")
#pragma STDC FP_CONTRACT ON

#include "softmax.h"

#include <ATen/Dispatch.h>

#include <cmath>
#include <type_traits>

#include "../common/autograd.h"
#include "../common/checks.h"
#include "../common/convert.h"
#include "../common/exp.h"
#include "../common/half_runs.h"
#include "../common/registration.h"
#include "../common/row_loops.h"
#include "../common/row_max.h"
#include "../common/row_sums.h"
#include "../common/torch_functions.h"

TORCH_LIBRARY_FRAGMENT(torch_fused, m) {
  m.def("softmax(Tensor input, *, ScalarType? dtype=None) -> Tensor");
  m.def("softmax_backward(Tensor grad, Tensor output) -> Tensor");
}

namespace torch_fused {

using at::Tensor;
using OptionalDtype = std::optional<at::ScalarType>;

Tensor converted(const Tensor& input, OptionalDtype dtype) {
  const at::ScalarType to = dtype.value_or(input.scalar_type());
  // Also a number that is no dtype, which torch.ops lets through.
  TORCH_CHECK(!dtype || takes_dtype(to, input), "softmax: dtype", dtypes_taken(input), c10::toString(to));
  return input.to(to);
}

SoftmaxShape check_softmax(const char* op, const char* argument, const Tensor& tensor) {
  check_dtype(op, argument, tensor);
  const int64_t cols = tensor.dim() ? tensor.size(-1) : 1;
  return {cols ? tensor.numel() / cols : 0, cols};
}

SoftmaxShape check_softmax_backward(const Tensor& grad, const Tensor& output) {
  check_grad("softmax_backward", "grad", grad, "output", output);
  return check_softmax("softmax_backward", "output", output);
}

// ---- CPU ------------------------------------------------------------------------------------------------------------

namespace {

template <class T>
struct Forward {
  const T* input;
  T* output;
  int64_t stride, cols;
};

template <class T>
TORCH_FUSED_INLINE void forward_rows(const Forward<T>& a, int64_t begin, int64_t end) {
  using W = wide_t<T>;
  const int64_t n = a.cols;
  W* const room = row_room<T>(n);
  for (int64_t row = begin; row < end; ++row) {
    const auto* x = readable(a.input + row * a.stride, n, room);
    T* y = a.output + row * n;
    W* exponentials;  // not yet rounded
    if constexpr (std::is_same_v<T, W>) {
      exponentials = y;
    } else {
      exponentials = room;
    }
    const W largest = row_max(x, n);
    const auto [sum] = row_sums<1, W>(n, [=](int64_t i, int64_t j, W(*sums)[kRowStreams]) {
      const W value = exp_nonpositive(widen(x[i]) - largest);
      exponentials[i] = value;
      sums[0][j] += value;
    });
    write_run(y, n, room, [=, sum = sum](int64_t i) { return exponentials[i] / sum; });
  }
}

template <class T>
struct Backward {
  const T* grad;
  const T* output;
  T* grad_input;
  int64_t grad_stride, output_stride, cols;
};

template <class T>
TORCH_FUSED_INLINE void backward_rows(const Backward<T>& a, int64_t begin, int64_t end) {
  using W = wide_t<T>;
  const int64_t n = a.cols;
  W *const grad_room = row_room<T, 0>(n), *const output_room = row_room<T, 1>(n);
  for (int64_t row = begin; row < end; ++row) {
    const auto* dy = readable(a.grad + row * a.grad_stride, n, grad_room);
    const auto* y = readable(a.output + row * a.output_stride, n, output_room);
    const auto [dot] = row_sums<1, W>(n, [=](int64_t i, int64_t j, W(*sums)[kRowStreams]) {
      sums[0][j] = std::fma(widen(dy[i]), widen(y[i]), sums[0][j]);
    });
    write_run(a.grad_input + row * n, n, grad_room,
              [=, dot = dot](int64_t i) { return widen(y[i]) * (widen(dy[i]) - dot); });
  }
}

TORCH_FUSED_LOOPS(Forward, forward_rows)
TORCH_FUSED_LOOPS(Backward, backward_rows)

}  // namespace

Tensor softmax_cpu(const Tensor& input, OptionalDtype dtype) {
  const Tensor values = converted(input, dtype);
  const SoftmaxShape shape = check_softmax("softmax", "input", values);
  const Tensor output = empty(values.sizes(), values.options());
  if (output.numel() == 0) return output;
  const Rows x = as_rows(values, shape.rows, shape.cols);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, output.scalar_type(), "softmax", [&] {
    run_parallel(
        Forward<scalar_t>{elements<const scalar_t>(x.tensor), elements<scalar_t>(output), x.stride, shape.cols},
        shape.rows, shape.cols);
  });
  return output;
}

Tensor softmax_backward_cpu(const Tensor& grad, const Tensor& output) {
  const SoftmaxShape shape = check_softmax_backward(grad, output);
  const Tensor grad_input = empty(output.sizes(), output.options());
  if (output.numel() == 0) return grad_input;
  const Rows dy = as_rows(grad, shape.rows, shape.cols), y = as_rows(output, shape.rows, shape.cols);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, output.scalar_type(), "softmax_backward", [&] {
    const Backward<scalar_t> args{elements<const scalar_t>(dy.tensor),
                                  elements<const scalar_t>(y.tensor),
                                  elements<scalar_t>(grad_input),
                                  dy.stride,
                                  y.stride,
                                  shape.cols};
    run_parallel(args, shape.rows, shape.cols);
  });
  return grad_input;
}

// ---- autograd and autocast ------------------------------------------------------------------------------------------

namespace {

Tensor call_softmax(const Tensor& input, OptionalDtype dtype) {
  static const auto op = find_op<decltype(softmax_cpu)>("torch_fused::softmax");
  return op.call(input, dtype);
}

struct SoftmaxFunction : torch::autograd::Function<SoftmaxFunction> {
  static constexpr char op[] = "softmax";

  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& input, OptionalDtype dtype) {
    at::AutoDispatchBelowADInplaceOrView below;
    const Tensor output = call_softmax(input, dtype);
    ctx->save_for_backward({output});
    ctx->saved_data["dtype"] = input.scalar_type();
    return output;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    static const auto backward_op = find_op<decltype(softmax_backward_cpu)>("torch_fused::softmax_backward");
    const Tensor grad = backward_op.call(grads[0], ctx->get_saved_variables()[0]);
    return {grad.to(ctx->saved_data["dtype"].toScalarType()), Tensor()};
  }
};

// Under autocast, what this torch does for its own softmax on the device: float32 unless a dtype is asked for.
template <c10::DispatchKey key>
Tensor softmax_autocast(const Tensor& input, OptionalDtype dtype) {
  static const bool torch_casts =
      c10::Dispatcher::singleton().findSchemaOrThrow("aten::softmax", "int").hasKernelForDispatchKey(key);
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const bool eligible = input.is_floating_point() && input.scalar_type() != at::kDouble;
  return call_softmax(input, torch_casts && eligible && !dtype ? OptionalDtype(at::kFloat) : dtype);
}

}  // namespace
}  // namespace torch_fused

TORCH_LIBRARY_IMPL(torch_fused, Autograd, m) {
  using namespace torch_fused;
  m.impl("softmax", Differentiable<SoftmaxFunction, decltype(softmax_cpu)>::call);
  m.impl("softmax_backward", differentiable_by_reference());
}
TORCH_LIBRARY_IMPL(torch_fused, AutocastCPU, m) {
  m.impl("softmax", torch_fused::softmax_autocast<c10::DispatchKey::AutocastCPU>);
}
TORCH_LIBRARY_IMPL(torch_fused, AutocastCUDA, m) {
  m.impl("softmax", torch_fused::softmax_autocast<c10::DispatchKey::AutocastCUDA>);
}
TORCH_LIBRARY_IMPL(torch_fused, AutocastMPS, m) {
  m.impl("softmax", torch_fused::softmax_autocast<c10::DispatchKey::AutocastMPS>);
}

TORCH_FUSED_KERNELS(softmax)
TORCH_FUSED_KERNELS(softmax_backward)
