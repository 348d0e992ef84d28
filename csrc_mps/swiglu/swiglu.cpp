// silu_mul, the activation of SwiGLU: schema, checks, autograd and the CPU kernels.

// Fused multiply-adds where the machine has them: half the work of exp's polynomial.
#pragma GCC optimize("fp-contract=fast")
#pragma STDC FP_CONTRACT ON

#include "swiglu.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "../common/autograd.h"
#include "../common/checks.h"
#include "../common/exp.h"
#include "../common/half_runs.h"
#include "../common/pairs.h"
#include "../common/simd.h"

TORCH_LIBRARY_FRAGMENT(torch_fused, m) {
  m.def("silu_mul(Tensor gate, Tensor up, *, str casting_mode=\"torch\") -> Tensor");
  m.def("silu_mul_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)");
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

// ---- CPU ------------------------------------------------------------------------------------------------------------

namespace {

// Elements a thread should at least have: below that, waking one costs more than it saves.
constexpr int64_t kGrain = 8192;

template <class T>
struct Forward {
  bool llama;
  int64_t cols;
  const T* gate;
  const T* up;
  T* output;
  int64_t gate_stride, up_stride;
};

template <class Wide>
TORCH_FUSED_INLINE Wide silu_of(Wide g) {
  return g / one_plus_exp(-g);
}

template <bool llama, class T>
TORCH_FUSED_INLINE void forward_row(const T* __restrict gate, const T* __restrict up, T* __restrict output, int64_t n) {
  int64_t i = 0;
  if constexpr (kInPairs<T>) {
    for (; i < n / 2; ++i) {
      const Pair g = load_pair(gate + 2 * i), u = load_pair(up + 2 * i);
      Pair silu{silu_of(g.first), silu_of(g.second)};
      if (llama) silu = round_pair(silu);
      store_pair(output + 2 * i, round_pair({silu.first * u.first, silu.second * u.second}));
    }
    i = n / 2 * 2;
  }
  for (; i < n; ++i) {
    const wide_t<T> silu = silu_of(widen(gate[i]));
    output[i] = narrow<T>((llama ? round_to<T>(silu) : silu) * widen(up[i]));
  }
}

template <bool llama>
TORCH_FUSED_INLINE void forward_row(const at::Half* gate, const at::Half* up, at::Half* output, int64_t n) {
  float silu[kHalfRun], other[kHalfRun];
  for (int64_t i = 0; i < n; i += kHalfRun) {
    const int64_t count = std::min(n - i, kHalfRun);
    widen_run(gate + i, silu, count);
    widen_run(up + i, other, count);
    for (int64_t j = 0; j < count; ++j) silu[j] = silu_of(silu[j]);
    if (llama) round_run(silu, output + i, count);
    for (int64_t j = 0; j < count; ++j) silu[j] *= other[j];
    narrow_run(silu, output + i, count);
  }
}

template <class T>
TORCH_FUSED_INLINE void run_row(const Forward<T>& a, int64_t row, int64_t column, int64_t n) {
  const T* gate = a.gate + row * a.gate_stride + column;
  const T* up = a.up + row * a.up_stride + column;
  T* output = a.output + row * a.cols + column;
  a.llama ? forward_row<true>(gate, up, output, n) : forward_row<false>(gate, up, output, n);
}

template <class T>
struct Backward {
  int64_t cols;
  const T* grad;
  const T* gate;
  const T* up;
  T* grad_gate;
  T* grad_up;
  int64_t grad_stride, gate_stride, up_stride;
};

template <class T>
TORCH_FUSED_INLINE void backward_row(const T* __restrict grad, const T* __restrict gate, const T* __restrict up,
                                     T* __restrict grad_gate, T* __restrict grad_up, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const wide_t<T> dy = widen(grad[i]), g = widen(gate[i]);
    const wide_t<T> sigmoid = 1 / one_plus_exp(-g);
    grad_gate[i] = narrow<T>(dy * widen(up[i]) * sigmoid * (1 + g * (1 - sigmoid)));
    grad_up[i] = narrow<T>(dy * g * sigmoid);
  }
}

TORCH_FUSED_INLINE void backward_row(const at::Half* grad, const at::Half* gate, const at::Half* up,
                                     at::Half* grad_gate, at::Half* grad_up, int64_t n) {
  float operands[3][kHalfRun], results[2][kHalfRun];
  for (int64_t i = 0; i < n; i += kHalfRun) {
    const int64_t count = std::min(n - i, kHalfRun);
    widen_run(grad + i, operands[0], count);
    widen_run(gate + i, operands[1], count);
    widen_run(up + i, operands[2], count);
    backward_row(operands[0], operands[1], operands[2], results[0], results[1], count);
    narrow_run(results[0], grad_gate + i, count);
    narrow_run(results[1], grad_up + i, count);
  }
}

template <class T>
TORCH_FUSED_INLINE void run_row(const Backward<T>& a, int64_t row, int64_t column, int64_t n) {
  const int64_t to = row * a.cols + column;
  backward_row(a.grad + row * a.grad_stride + column, a.gate + row * a.gate_stride + column,
               a.up + row * a.up_stride + column, a.grad_gate + to, a.grad_up + to, n);
}

// Elements begin .. end - 1 of all rows.
template <class Args>
TORCH_FUSED_INLINE void run_elements(const Args& args, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t row = begin / args.cols, column = begin % args.cols;
    const int64_t n = std::min(args.cols - column, end - begin);
    run_row(args, row, column, n);
    begin += n;
  }
}

#define SWIGLU_LOOPS(T)                                                         \
  TORCH_FUSED_SIMD void run(const Forward<T>& a, int64_t begin, int64_t end) {  \
    run_elements(a, begin, end);                                                \
  }                                                                             \
  TORCH_FUSED_SIMD void run(const Backward<T>& a, int64_t begin, int64_t end) { \
    run_elements(a, begin, end);                                                \
  }
SWIGLU_LOOPS(float)
SWIGLU_LOOPS(double)
SWIGLU_LOOPS(at::Half)
SWIGLU_LOOPS(at::BFloat16)

template <class Args>
void run_parallel(const Args& args, int64_t count) {
  at::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

}  // namespace

Tensor silu_mul_cpu(const Tensor& gate, const Tensor& up, std::string_view casting_mode) {
  const bool llama = is_llama("silu_mul", casting_mode);
  const SwigluRows call = check_swiglu("silu_mul", {{"gate", &gate}, {"up", &up}});
  const Tensor output = at::empty(gate.sizes(), gate.options());
  const Rows &g = call.operands[0], &u = call.operands[1];
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, gate.scalar_type(), "silu_mul", [&] {
    const Forward<scalar_t> args{llama,
                                 call.cols,
                                 elements<const scalar_t>(g.tensor),
                                 elements<const scalar_t>(u.tensor),
                                 elements<scalar_t>(output),
                                 g.stride,
                                 u.stride};
    run_parallel(args, output.numel());
  });
  return output;
}

std::tuple<Tensor, Tensor> silu_mul_backward_cpu(const Tensor& grad, const Tensor& gate, const Tensor& up) {
  const SwigluRows call = check_swiglu("silu_mul_backward", {{"grad", &grad}, {"gate", &gate}, {"up", &up}});
  const Tensor grad_gate = at::empty(gate.sizes(), gate.options()), grad_up = at::empty(up.sizes(), up.options());
  const Rows &dy = call.operands[0], &g = call.operands[1], &u = call.operands[2];
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, gate.scalar_type(), "silu_mul_backward", [&] {
    const Backward<scalar_t> args{call.cols,
                                  elements<const scalar_t>(dy.tensor),
                                  elements<const scalar_t>(g.tensor),
                                  elements<const scalar_t>(u.tensor),
                                  elements<scalar_t>(grad_gate),
                                  elements<scalar_t>(grad_up),
                                  dy.stride,
                                  g.stride,
                                  u.stride};
    run_parallel(args, gate.numel());
  });
  return {grad_gate, grad_up};
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

}  // namespace
}  // namespace torch_fused

TORCH_LIBRARY_IMPL(torch_fused, Autograd, m) {
  using namespace torch_fused;
  m.impl("silu_mul", Differentiable<SiluMulFunction, decltype(silu_mul_cpu)>::call);
  m.impl("silu_mul_backward", differentiable_by_reference());
}
