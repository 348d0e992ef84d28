// Rotary position embedding of queries and keys: schema, checks, autograd and the CPU kernels.
#include "rope.h"

#include <ATen/Dispatch.h>

#include <algorithm>
#include <type_traits>

#include "../common/autograd.h"
#include "../common/checks.h"
#include "../common/convert.h"
#include "../common/half_runs.h"
#include "../common/registration.h"
#include "../common/row_loops.h"

TORCH_LIBRARY_FRAGMENT(torch_fused, m) {
  m.def(
      "apply_rotary_pos_emb(Tensor q, Tensor k, Tensor cos, Tensor sin, int unsqueeze_dim=1, *, "
      "str casting_mode=\"torch\") -> (Tensor, Tensor)");
  m.def(
      "apply_rotary_pos_emb_backward(Tensor grad_q, Tensor grad_k, Tensor cos, Tensor sin, int unsqueeze_dim) -> "
      "(Tensor, Tensor)");
}

namespace torch_fused {

using at::Tensor;

// ---- checks ---------------------------------------------------------------------------------------------------------

namespace {

RopeStrides strides_of(const Tensor& tensor, int64_t head_axis) {
  return {tensor.stride(0), tensor.stride(3 - head_axis), tensor.stride(head_axis)};
}

RopeHeads heads_of(const char* op, const char* name, const Tensor& tensor, int64_t head_axis, const Tensor& cos) {
  check_alike(op, name, tensor, "cos", cos);
  const Tensor input = tensor.stride(3) == 1 || tensor.size(3) == 1 ? tensor : tensor.contiguous();
  const Tensor output = empty_rows_like(tensor);
  return {input, output, strides_of(input, head_axis), strides_of(output, head_axis), tensor.size(head_axis)};
}

// A table (batch or 1, tokens or 1, rotary_dim) with dense rows; the strides are 0 where one row serves all.
Tensor check_table(const char* op, const char* name, const Tensor& table, int64_t batch, int64_t tokens,
                   int64_t& batch_stride, int64_t& token_stride) {
  TORCH_CHECK(table.dim() == 3 && (table.size(0) == batch || table.size(0) == 1) &&
                  (table.size(1) == tokens || table.size(1) == 1),
              op, ": ", name, " must be (", batch, " or 1, ", tokens, " or 1, rotary_dim), got shape ", table.sizes());
  const Tensor dense = table.stride(2) == 1 || table.size(2) == 1 ? table : table.contiguous();
  batch_stride = table.size(0) == 1 ? 0 : dense.stride(0);
  token_stride = table.size(1) == 1 ? 0 : dense.stride(1);
  return dense;
}

}  // namespace

Rope check_rope(const RopeNames& names, const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                int64_t unsqueeze_dim, std::string_view casting_mode) {
  const char* const op = names.op;
  Rope call;
  call.llama = is_llama(op, casting_mode);
  check_dtype(op, "cos", cos);
  check_alike(op, "sin", sin, "cos", cos);
  TORCH_CHECK(unsqueeze_dim == 1 || unsqueeze_dim == 2, op,
              ": unsqueeze_dim must be 1 for (batch, heads, tokens, head_dim) or 2 for (batch, tokens, heads, "
              "head_dim), got ",
              unsqueeze_dim);
  TORCH_CHECK(q.dim() == 4, op, ": ", names.q, " must have four dimensions, got shape ", q.sizes());
  TORCH_CHECK(k.dim() == 4 && k.size(0) == q.size(0) && k.size(3 - unsqueeze_dim) == q.size(3 - unsqueeze_dim) &&
                  k.size(3) == q.size(3),
              op, ": ", names.k, " must have ", names.q, "'s shape except for the heads, ", q.sizes(), ", got ",
              k.sizes());
  call.batch = q.size(0);
  call.tokens = q.size(3 - unsqueeze_dim);
  call.head_dim = q.size(3);
  call.cos = check_table(op, "cos", cos, call.batch, call.tokens, call.cos_batch, call.cos_token);
  call.sin = check_table(op, "sin", sin, call.batch, call.tokens, call.sin_batch, call.sin_token);
  call.rotary_dim = cos.size(2);
  TORCH_CHECK(call.rotary_dim % 2 == 0 && call.rotary_dim <= call.head_dim, op,
              ": rotary_dim, the last dimension of cos, must be even and at most head_dim ", call.head_dim, ", got ",
              call.rotary_dim);
  TORCH_CHECK(sin.size(2) == call.rotary_dim, op, ": sin must have cos's rotary_dim ", call.rotary_dim, ", got ",
              sin.size(2));
  call.q = heads_of(op, names.q, q, unsqueeze_dim, cos);
  call.k = heads_of(op, names.k, k, unsqueeze_dim, cos);
  return call;
}

// ---- CPU ------------------------------------------------------------------------------------------------------------

namespace {

template <class T>
struct Operand {
  const T* input;
  T* output;
  RopeStrides from, to;
  int64_t heads;

  explicit Operand(const RopeHeads& x)
      : input(elements<const T>(x.input)), output(elements<T>(x.output)), from(x.from), to(x.to), heads(x.heads) {}
};

template <class T>
struct Tables {
  const T* cos;
  const T* sin;
};

// y = a * cos + (negate ? -b : b) * sin
template <bool negate, bool llama, class T>
TORCH_FUSED_INLINE void rotate(const T* __restrict a, const T* __restrict b, const T* __restrict cos,
                               const T* __restrict sin, T* __restrict y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const wide_t<T> straight = widen(a[i]) * widen(cos[i]);
    const wide_t<T> crossed = (negate ? -widen(b[i]) : widen(b[i])) * widen(sin[i]);
    y[i] = narrow<T>(llama ? round_to<T>(straight) + round_to<T>(crossed) : straight + crossed);
  }
}

// `count` heads of float16, one after the other, that are rotated whole: at most kHalfRun elements. The tables of their
// token are floats.
template <bool transposed, bool llama>
TORCH_FUSED_INLINE void rotate_heads(const at::Half* from, const float* cos, const float* sin, at::Half* to,
                                     int64_t half, int64_t count) {
  float heads[kHalfRun], products[2 * kHalfRun];
  const int64_t dim = 2 * half, n = count * dim;
  const float* sin_a = sin + (transposed ? half : 0);
  const float* sin_b = sin + (transposed ? 0 : half);
  widen_run(from, heads, n);
  for (int64_t head = 0; head < n; head += dim) {
    const float* x = heads + head;
    float* straight = products + head;
    float* crossed = products + n + head;
    for (int64_t i = 0; i < dim; ++i) straight[i] = x[i] * cos[i];
    for (int64_t i = 0; i < half; ++i) {
      crossed[i] = (transposed ? x[half + i] : -x[half + i]) * sin_a[i];
      crossed[half + i] = (transposed ? -x[i] : x[i]) * sin_b[i];
    }
  }
  if (llama) {
    at::Half rounded[2 * kHalfRun];
    round_run(products, rounded, 2 * n);
  }
  for (int64_t i = 0; i < n; ++i) heads[i] = products[i] + products[n + i];
  narrow_run(heads, to, n);
}

template <bool transposed, bool llama>
TORCH_FUSED_INLINE void rotate_token_in_runs(const Operand<at::Half>& x, int64_t batch, int64_t token,
                                             const Tables<at::Half>& tables, int64_t half, int64_t head_dim) {
  const int64_t dim = 2 * half;
  float cos[kHalfRun], sin[kHalfRun];
  widen_run(tables.cos, cos, dim);
  widen_run(tables.sin, sin, dim);
  const bool dense = dim > 0 && head_dim == dim && x.from.head == dim && x.to.head == dim;
  const int64_t at_once = dense ? kHalfRun / dim : 1;
  for (int64_t head = 0; head < x.heads; head += at_once) {
    const at::Half* from = x.input + batch * x.from.batch + token * x.from.token + head * x.from.head;
    at::Half* to = x.output + batch * x.to.batch + token * x.to.token + head * x.to.head;
    rotate_heads<transposed, llama>(from, cos, sin, to, half, std::min(at_once, x.heads - head));
    if (!dense) std::copy(from + dim, from + head_dim, to + dim);
  }
}

template <bool transposed, bool llama, class T>
TORCH_FUSED_INLINE void rotate_token(const Operand<T>& x, int64_t batch, int64_t token, const Tables<T>& tables,
                                     int64_t half, int64_t head_dim) {
  if constexpr (std::is_same_v<T, at::Half>) {
    if (2 * half <= kHalfRun) return rotate_token_in_runs<transposed, llama>(x, batch, token, tables, half, head_dim);
  }
  const T* sin_a = tables.sin + (transposed ? half : 0);
  const T* sin_b = tables.sin + (transposed ? 0 : half);
  for (int64_t head = 0; head < x.heads; ++head) {
    const T* from = x.input + batch * x.from.batch + token * x.from.token + head * x.from.head;
    T* to = x.output + batch * x.to.batch + token * x.to.token + head * x.to.head;
    rotate<!transposed, llama>(from, from + half, tables.cos, sin_a, to, half);
    rotate<transposed, llama>(from + half, from, tables.cos + half, sin_b, to + half, half);
    std::copy(from + 2 * half, from + head_dim, to + 2 * half);
  }
}

template <class T>
struct Call {
  Operand<T> q, k;
  Tables<T> tables;
  const Rope& rope;
  bool transposed;
};

template <bool transposed, bool llama, class T>
TORCH_FUSED_INLINE void rotate_tokens(const Call<T>& a, int64_t begin, int64_t end) {
  const Rope& rope = a.rope;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t batch = i / rope.tokens, token = i % rope.tokens, half = rope.rotary_dim / 2;
    const Tables<T> row{a.tables.cos + batch * rope.cos_batch + token * rope.cos_token,
                        a.tables.sin + batch * rope.sin_batch + token * rope.sin_token};
    rotate_token<transposed, llama>(a.q, batch, token, row, half, rope.head_dim);
    rotate_token<transposed, llama>(a.k, batch, token, row, half, rope.head_dim);
  }
}

template <class T>
TORCH_FUSED_INLINE void rotate_all(const Call<T>& a, int64_t begin, int64_t end) {
  if (a.transposed) return rotate_tokens<true, false>(a, begin, end);
  if constexpr (kRounds<T>) {
    if (a.rope.llama) return rotate_tokens<false, true>(a, begin, end);
  }
  rotate_tokens<false, false>(a, begin, end);
}

TORCH_FUSED_LOOPS(Call, rotate_all)

std::tuple<Tensor, Tensor> run_rope(const Rope& rope, bool transposed) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, rope.cos.scalar_type(), "apply_rotary_pos_emb", [&] {
    const Call<scalar_t> call{Operand<scalar_t>(rope.q),
                              Operand<scalar_t>(rope.k),
                              {elements<const scalar_t>(rope.cos), elements<const scalar_t>(rope.sin)},
                              rope,
                              transposed};
    run_parallel(call, rope.batch * rope.tokens, (rope.q.heads + rope.k.heads) * rope.head_dim);
  });
  return {rope.q.output, rope.k.output};
}

}  // namespace

std::tuple<Tensor, Tensor> apply_rotary_pos_emb_cpu(const Tensor& q, const Tensor& k, const Tensor& cos,
                                                    const Tensor& sin, int64_t unsqueeze_dim,
                                                    std::string_view casting_mode) {
  return run_rope(check_rope(kRopeForward, q, k, cos, sin, unsqueeze_dim, casting_mode), false);
}

std::tuple<Tensor, Tensor> apply_rotary_pos_emb_backward_cpu(const Tensor& grad_q, const Tensor& grad_k,
                                                             const Tensor& cos, const Tensor& sin,
                                                             int64_t unsqueeze_dim) {
  return run_rope(check_rope(kRopeBackward, grad_q, grad_k, cos, sin, unsqueeze_dim, "torch"), true);
}

// ---- autograd -------------------------------------------------------------------------------------------------------

namespace {

std::tuple<Tensor, Tensor> call_rope(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                                     int64_t unsqueeze_dim, std::string_view casting_mode) {
  static const auto op = find_op<decltype(apply_rotary_pos_emb_cpu)>("torch_fused::apply_rotary_pos_emb");
  return op.call(q, k, cos, sin, unsqueeze_dim, casting_mode);
}

struct RopeFunction : torch::autograd::Function<RopeFunction> {
  static constexpr char op[] = "apply_rotary_pos_emb";

  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const Tensor& q, const Tensor& k,
                                                const Tensor& cos, const Tensor& sin, int64_t unsqueeze_dim,
                                                std::string_view casting_mode) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({cos, sin});
    ctx->saved_data["unsqueeze_dim"] = unsqueeze_dim;
    auto [q_out, k_out] = call_rope(q, k, cos, sin, unsqueeze_dim, casting_mode);
    return {q_out, k_out};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    static const auto backward_op =
        find_op<decltype(apply_rotary_pos_emb_backward_cpu)>("torch_fused::apply_rotary_pos_emb_backward");
    const auto saved = ctx->get_saved_variables();
    auto [grad_q, grad_k] =
        backward_op.call(grads[0], grads[1], saved[0], saved[1], ctx->saved_data["unsqueeze_dim"].toInt());
    return {grad_q, grad_k, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor> rope_autograd(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                                         int64_t unsqueeze_dim, std::string_view casting_mode) {
  using Op = Differentiable<RopeFunction, decltype(apply_rotary_pos_emb_cpu)>;
  // The backward op has no gradient of the tables.
  if (needs_gradient(cos) || needs_gradient(sin)) return Op::reference(q, k, cos, sin, unsqueeze_dim, casting_mode);
  return Op::call(q, k, cos, sin, unsqueeze_dim, casting_mode);
}

}  // namespace
}  // namespace torch_fused

TORCH_LIBRARY_IMPL(torch_fused, Autograd, m) {
  m.impl("apply_rotary_pos_emb", torch_fused::rope_autograd);
  m.impl("apply_rotary_pos_emb_backward", torch_fused::differentiable_by_reference());
}

TORCH_FUSED_KERNELS(apply_rotary_pos_emb)
TORCH_FUSED_KERNELS(apply_rotary_pos_emb_backward)
