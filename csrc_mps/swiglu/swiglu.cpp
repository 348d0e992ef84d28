// silu_mul, the activation of SwiGLU, and gelu_mul: schemas, checks, autograd and the CPU kernels.

// Fused multiply-adds where the machine has them: half the work of exp's polynomial.
#pragma GCC optimize("fp-contract=fast")
#pragma STDC FP_CONTRACT ON

#include "swiglu.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "../common/activation.h"
#include "../common/autograd.h"
#include "../common/checks.h"
#include "../common/half_runs.h"
#include "../common/pairs.h"
#include "../common/registration.h"
#include "../common/row_loops.h"
#include "../common/torch_functions.h"

TORCH_LIBRARY_FRAGMENT(torch_fused, m) {
  m.def("silu_mul(Tensor gate, Tensor up, *, str casting_mode=\"torch\") -> Tensor");
  m.def("silu_mul_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)");
  m.def("gelu_mul(Tensor gate, Tensor up, *, str approximate=\"none\", str casting_mode=\"torch\") -> Tensor");
  m.def("gelu_mul_backward(Tensor grad, Tensor gate, Tensor up, *, str approximate=\"none\") -> (Tensor, Tensor)");
}

namespace torch_fused {

using at::Tensor;

SwigluRows check_swiglu(const char* op, std::initializer_list<std::pair<const char*, const Tensor*>> operands) {
  const auto& [first_name, first] = *operands.begin();
  check_dtype(op, first_name, *first);
  bool dense = true;
  for (const auto& [name, tensor] : operands) {
    check_same_shape(op, name, *tensor, first_name, *first);
    check_alike(op, name, *tensor, first_name, *first);
    dense = dense && tensor->is_contiguous();
  }
  const int64_t cols = dense || first->dim() == 0 ? first->numel() : first->size(-1);
  SwigluRows call{cols ? first->numel() / cols : 0, cols, {}};
  for (const auto& operand : operands) call.operands.push_back(as_rows(*operand.second, call.rows, call.cols));
  return call;
}

bool is_tanh(const char* op, std::string_view approximate) {
  TORCH_CHECK(approximate == "none" || approximate == "tanh", op, ": approximate must be 'none' or 'tanh', got '",
              approximate, "'");
  return approximate == "tanh";
}

// ---- CPU ------------------------------------------------------------------------------------------------------------

namespace {

// Elements a thread should at least have: below that, waking one costs more than it saves.
constexpr int64_t kGrain = 8192;

template <class T>
struct Forward {
  uint32_t activation;
  bool llama;
  int64_t cols;
  const T* gate;
  const T* up;
  T* output;
  int64_t gate_stride, up_stride;
};

template <uint32_t activation, bool llama, class T>
TORCH_FUSED_INLINE void forward_row(const T* __restrict gate, const T* __restrict up, T* __restrict output, int64_t n) {
  int64_t i = 0;
  if constexpr (kInPairs<T>) {
    for (; i < n / 2; ++i) {
      const Pair g = load_pair(gate + 2 * i), u = load_pair(up + 2 * i);
      Pair activated{activate<activation>(g.first), activate<activation>(g.second)};
      if (llama) activated = round_pair(activated);
      store_pair(output + 2 * i, round_pair({activated.first * u.first, activated.second * u.second}));
    }
    i = n / 2 * 2;
  }
  for (; i < n; ++i) {
    const wide_t<T> activated = activate<activation>(widen(gate[i]));
    output[i] = narrow<T>((llama ? round_to<T>(activated) : activated) * widen(up[i]));
  }
}

template <uint32_t activation, bool llama>
TORCH_FUSED_INLINE void forward_row(const at::Half* gate, const at::Half* up, at::Half* output, int64_t n) {
  float activated[kHalfRun], other[kHalfRun];
  for (int64_t i = 0; i < n; i += kHalfRun) {
    const int64_t count = std::min(n - i, kHalfRun);
    widen_run(gate + i, activated, count);
    widen_run(up + i, other, count);
    for (int64_t j = 0; j < count; ++j) activated[j] = activate<activation>(activated[j]);
    if (llama) round_run(activated, output + i, count);
    for (int64_t j = 0; j < count; ++j) activated[j] *= other[j];
    narrow_run(activated, output + i, count);
  }
}

template <uint32_t activation, class T>
TORCH_FUSED_INLINE void run_row(const Forward<T>& a, int64_t row, int64_t column, int64_t n) {
  const T* gate = a.gate + row * a.gate_stride + column;
  const T* up = a.up + row * a.up_stride + column;
  T* output = a.output + row * a.cols + column;
  if constexpr (kRounds<T>) {
    if (a.llama) return forward_row<activation, true>(gate, up, output, n);
  }
  forward_row<activation, false>(gate, up, output, n);
}

template <class T>
struct Backward {
  uint32_t activation;
  int64_t cols;
  const T* grad;
  const T* gate;
  const T* up;
  T* grad_gate;
  T* grad_up;
  int64_t grad_stride, gate_stride, up_stride;
};

template <uint32_t activation, class T>
TORCH_FUSED_INLINE void backward_row(const T* __restrict grad, const T* __restrict gate, const T* __restrict up,
                                     T* __restrict grad_gate, T* __restrict grad_up, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const wide_t<T> dy = widen(grad[i]);
    const auto activated = activate_with_slope<activation>(widen(gate[i]));
    grad_gate[i] = narrow<T>(dy * widen(up[i]) * activated.slope);
    grad_up[i] = narrow<T>(dy * activated.value);
  }
}

template <uint32_t activation>
TORCH_FUSED_INLINE void backward_row(const at::Half* grad, const at::Half* gate, const at::Half* up,
                                     at::Half* grad_gate, at::Half* grad_up, int64_t n) {
  float operands[3][kHalfRun], results[2][kHalfRun];
  for (int64_t i = 0; i < n; i += kHalfRun) {
    const int64_t count = std::min(n - i, kHalfRun);
    widen_run(grad + i, operands[0], count);
    widen_run(gate + i, operands[1], count);
    widen_run(up + i, operands[2], count);
    backward_row<activation>(operands[0], operands[1], operands[2], results[0], results[1], count);
    narrow_run(results[0], grad_gate + i, count);
    narrow_run(results[1], grad_up + i, count);
  }
}

template <uint32_t activation, class T>
TORCH_FUSED_INLINE void run_row(const Backward<T>& a, int64_t row, int64_t column, int64_t n) {
  const int64_t to = row * a.cols + column;
  backward_row<activation>(a.grad + row * a.grad_stride + column, a.gate + row * a.gate_stride + column,
                           a.up + row * a.up_stride + column, a.grad_gate + to, a.grad_up + to, n);
}

// Elements begin .. end - 1 of all rows.
template <uint32_t activation, class Args>
TORCH_FUSED_INLINE void run_elements(const Args& args, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t row = begin / args.cols, column = begin % args.cols;
    const int64_t n = std::min(args.cols - column, end - begin);
    run_row<activation>(args, row, column, n);
    begin += n;
  }
}

template <class Args>
TORCH_FUSED_INLINE void run_activation(const Args& args, int64_t begin, int64_t end) {
  if (args.activation == kSilu) return run_elements<kSilu>(args, begin, end);
  if (args.activation == kGelu) return run_elements<kGelu>(args, begin, end);
  run_elements<kGeluTanh>(args, begin, end);
}

TORCH_FUSED_LOOPS(Forward, run_activation)
TORCH_FUSED_LOOPS(Backward, run_activation)

Tensor forward_cpu(const char* op, uint32_t activation, const Tensor& gate, const Tensor& up,
                   std::string_view casting_mode) {
  const bool llama = is_llama(op, casting_mode);
  const SwigluRows call = check_swiglu(op, {{"gate", &gate}, {"up", &up}});
  const Tensor output = empty(gate.sizes(), gate.options());
  const Rows &g = call.operands[0], &u = call.operands[1];
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, gate.scalar_type(), "gated", [&] {
    const Forward<scalar_t> args{activation,
                                 llama,
                                 call.cols,
                                 elements<const scalar_t>(g.tensor),
                                 elements<const scalar_t>(u.tensor),
                                 elements<scalar_t>(output),
                                 g.stride,
                                 u.stride};
    at::parallel_for(0, output.numel(), kGrain, [&](int64_t begin, int64_t end) { run(args, begin, end); });
  });
  return output;
}

std::tuple<Tensor, Tensor> backward_cpu(const char* op, uint32_t activation, const Tensor& grad, const Tensor& gate,
                                        const Tensor& up) {
  const SwigluRows call = check_swiglu(op, {{"grad", &grad}, {"gate", &gate}, {"up", &up}});
  const Tensor grad_gate = empty(gate.sizes(), gate.options()), grad_up = empty(up.sizes(), up.options());
  const Rows &dy = call.operands[0], &g = call.operands[1], &u = call.operands[2];
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, gate.scalar_type(), "gated", [&] {
    const Backward<scalar_t> args{activation,
                                  call.cols,
                                  elements<const scalar_t>(dy.tensor),
                                  elements<const scalar_t>(g.tensor),
                                  elements<const scalar_t>(u.tensor),
                                  elements<scalar_t>(grad_gate),
                                  elements<scalar_t>(grad_up),
                                  dy.stride,
                                  g.stride,
                                  u.stride};
    at::parallel_for(0, gate.numel(), kGrain, [&](int64_t begin, int64_t end) { run(args, begin, end); });
  });
  return {grad_gate, grad_up};
}

}  // namespace

Tensor silu_mul_cpu(const Tensor& gate, const Tensor& up, std::string_view casting_mode) {
  return forward_cpu("silu_mul", kSilu, gate, up, casting_mode);
}

std::tuple<Tensor, Tensor> silu_mul_backward_cpu(const Tensor& grad, const Tensor& gate, const Tensor& up) {
  return backward_cpu("silu_mul_backward", kSilu, grad, gate, up);
}

Tensor gelu_mul_cpu(const Tensor& gate, const Tensor& up, std::string_view approximate, std::string_view casting_mode) {
  return forward_cpu("gelu_mul", is_tanh("gelu_mul", approximate) ? kGeluTanh : kGelu, gate, up, casting_mode);
}

std::tuple<Tensor, Tensor> gelu_mul_backward_cpu(const Tensor& grad, const Tensor& gate, const Tensor& up,
                                                 std::string_view approximate) {
  static constexpr char op[] = "gelu_mul_backward";
  return backward_cpu(op, is_tanh(op, approximate) ? kGeluTanh : kGelu, grad, gate, up);
}

// ---- autograd -------------------------------------------------------------------------------------------------------

namespace {

Tensor call_silu_mul(const Tensor& gate, const Tensor& up, std::string_view casting_mode) {
  static const auto op = find_op<decltype(silu_mul_cpu)>("torch_fused::silu_mul");
  return op.call(gate, up, casting_mode);
}

struct SiluMulFunction : torch::autograd::Function<SiluMulFunction> {
  static constexpr char op[] = "silu_mul";

  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& gate, const Tensor& up,
                        std::string_view casting_mode) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({gate, up});
    return call_silu_mul(gate, up, casting_mode);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    static const auto backward_op = find_op<decltype(silu_mul_backward_cpu)>("torch_fused::silu_mul_backward");
    const auto saved = ctx->get_saved_variables();
    auto [grad_gate, grad_up] = backward_op.call(grads[0], saved[0], saved[1]);
    return {grad_gate, grad_up, Tensor()};
  }
};

Tensor call_gelu_mul(const Tensor& gate, const Tensor& up, std::string_view approximate,
                     std::string_view casting_mode) {
  static const auto op = find_op<decltype(gelu_mul_cpu)>("torch_fused::gelu_mul");
  return op.call(gate, up, approximate, casting_mode);
}

struct GeluMulFunction : torch::autograd::Function<GeluMulFunction> {
  static constexpr char op[] = "gelu_mul";

  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& gate, const Tensor& up,
                        std::string_view approximate, std::string_view casting_mode) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({gate, up});
    ctx->saved_data["approximate"] = std::string(approximate);
    return call_gelu_mul(gate, up, approximate, casting_mode);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    static const auto backward_op = find_op<decltype(gelu_mul_backward_cpu)>("torch_fused::gelu_mul_backward");
    const auto saved = ctx->get_saved_variables();
    const std::string approximate = ctx->saved_data["approximate"].toStringRef();
    auto [grad_gate, grad_up] = backward_op.call(grads[0], saved[0], saved[1], approximate);
    return {grad_gate, grad_up, Tensor(), Tensor()};
  }
};

}  // namespace
}  // namespace torch_fused

TORCH_LIBRARY_IMPL(torch_fused, Autograd, m) {
  using namespace torch_fused;
  m.impl("silu_mul", Differentiable<SiluMulFunction, decltype(silu_mul_cpu)>::call);
  m.impl("silu_mul_backward", differentiable_by_reference());
  m.impl("gelu_mul", Differentiable<GeluMulFunction, decltype(gelu_mul_cpu)>::call);
  m.impl("gelu_mul_backward", differentiable_by_reference());
}

TORCH_FUSED_KERNELS(silu_mul)
TORCH_FUSED_KERNELS(silu_mul_backward)
TORCH_FUSED_KERNELS(gelu_mul)
TORCH_FUSED_KERNELS(gelu_mul_backward)
