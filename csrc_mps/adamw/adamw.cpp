// AdamW over many tensors, in place: schema, checks, autograd and the CPU kernel.
#include "adamw.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "../common/autograd.h"
#include "../common/checks.h"
#include "../common/convert.h"
#include "../common/lazy_views.h"
#include "../common/memory.h"
#include "../common/rows.h"
#include "../common/simd.h"

TORCH_LIBRARY_FRAGMENT(torch_fused, m) {
  m.def(
      "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] steps, *, float lr=1e-3, float beta1=0.9, float beta2=0.999, float eps=1e-8, "
      "float weight_decay=1e-2, bool maximize=False) -> ()");
}

namespace torch_fused {

using at::Tensor;
using at::TensorList;

// ---- checks ---------------------------------------------------------------------------------------------------------

namespace {

void check_settings(const AdamwSettings& s) {
  const auto check = [](const char* name, double value, double limit) {
    TORCH_CHECK(value >= 0 && value < limit, "adamw_: ", name, " must be at least 0 and below ", limit, ", got ",
                value);
  };
  constexpr double kLargest = std::numeric_limits<float>::max();
  check("lr", s.lr, kLargest);
  check("beta1", s.beta1, 1);
  check("beta2", s.beta2, 1);
  check("eps", s.eps, kLargest);
  check("weight_decay", s.weight_decay, kLargest);
}

void check_param(const Tensor& param, const Tensor& first, size_t i) {
  TORCH_CHECK(takes_dtype(param.scalar_type(), param), "adamw_: params[", i, "]", dtypes_taken(param),
              param.scalar_type());
  TORCH_CHECK(param.device() == first.device(), "adamw_: params[", i, "] must be on the device of params[0], ",
              first.device(), ", got ", param.device());
}

void check_like_param(const char* name, const Tensor& tensor, const Tensor& param, size_t i) {
  TORCH_CHECK(tensor.sizes() == param.sizes(), "adamw_: ", name, "[", i, "] must have the shape of params[", i, "], ",
              param.sizes(), ", got ", tensor.sizes());
  TORCH_CHECK(tensor.device() == param.device(), "adamw_: ", name, "[", i, "] must be on the device of params[", i,
              "], ", param.device(), ", got ", tensor.device());
}

void check_dtypes(const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq, size_t i) {
  const at::ScalarType dtype = param.scalar_type(), state = exp_avg.scalar_type();
  TORCH_CHECK(grad.scalar_type() == dtype, "adamw_: grads[", i, "] must have the dtype of params[", i, "], ", dtype,
              ", got ", grad.scalar_type());
  TORCH_CHECK(state == dtype || (state == at::kFloat && dtype != at::kDouble), "adamw_: exp_avgs[", i,
              "] must have the dtype of params[", i, "], ", dtype, ", or be float32, got ", state);
  TORCH_CHECK(exp_avg_sq.scalar_type() == state, "adamw_: exp_avg_sqs[", i, "] must have the dtype of exp_avgs[", i,
              "], ", state, ", got ", exp_avg_sq.scalar_type());
}

void check_step(const Tensor& step, size_t i) {
  TORCH_CHECK(step.is_cpu() && step.scalar_type() == at::kFloat && step.numel() == 1, "adamw_: steps[", i,
              "] must be one float32 on the CPU, got ", step.numel(), " of ", step.scalar_type(), " on ",
              step.device());
}

void check_length(const char* name, TensorList list, TensorList params) {
  TORCH_CHECK(list.size() == params.size(), "adamw_: ", name, " must have as many tensors as params, ", params.size(),
              ", got ", list.size());
}

bool same_places(const Tensor& a, const Tensor& b) {
  return a.strides() == b.strides() || (a.is_contiguous() && b.is_contiguous());
}

Tensor copy_to_places_of(const Tensor& places, const Tensor& tensor) {
  return at::empty_strided(places.sizes(), places.strides(), tensor.options()).copy_(tensor);
}

}  // namespace

AdamwCall::AdamwCall(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs, TensorList steps,
                     const AdamwSettings& settings)
    : steps_(steps) {
  check_settings(settings);
  check_length("grads", grads, params);
  check_length("exp_avgs", exp_avgs, params);
  check_length("exp_avg_sqs", exp_avg_sqs, params);
  check_length("steps", steps, params);
  MemoryCheck memory("adamw_");
  for (size_t i = 0; i < params.size(); ++i) {
    check_param(params[i], params[0], i);
    check_like_param("grads", grads[i], params[i], i);
    check_like_param("exp_avgs", exp_avgs[i], params[i], i);
    check_like_param("exp_avg_sqs", exp_avg_sqs[i], params[i], i);
    check_dtypes(params[i], grads[i], exp_avgs[i], exp_avg_sqs[i], i);
    check_step(steps[i], i);
    const auto index = static_cast<int64_t>(i);
    memory.writes("params", params[i], index);
    memory.writes("exp_avgs", exp_avgs[i], index);
    memory.writes("exp_avg_sqs", exp_avg_sqs[i], index);
    memory.writes("steps", steps[i], index);
    memory.reads("grads", grads[i], index);
  }
  memory.run();
  tensors_.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    if (params[i].numel() > 0) add(params[i], grads[i], exp_avgs[i], exp_avg_sqs[i], steps[i]);
  }
}

// A dense parameter is updated in place whatever the order of its dimensions; operands in another order, and parameters
// with gaps, go through a copy.
void AdamwCall::add(const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                    const Tensor& step) {
  const Tensor places = param.is_non_overlapping_and_dense() ? param : param.contiguous();
  const auto updated = [&](const Tensor& tensor) {
    if (same_places(tensor, places)) return tensor;
    copied_.emplace_back(tensor, copy_to_places_of(places, tensor));
    return copied_.back().second;
  };
  tensors_.push_back({updated(param), same_places(grad, places) ? grad : copy_to_places_of(places, grad),
                      updated(exp_avg), updated(exp_avg_sq), *elements<const float>(step) + 1.0});
}

void AdamwCall::finish() const {
  for (const auto& [operand, copy] : copied_) operand.copy_(copy);
  for (const Tensor& step : steps_) *elements<float>(step) += 1;
}

// ---- CPU ------------------------------------------------------------------------------------------------------------

namespace {

constexpr int64_t kChunk = 16384;  // elements a thread takes at a time; a multiple of any cache line

template <class P, class S>
TORCH_FUSED_INLINE void update_elements(P* __restrict param, const P* __restrict grad, S* __restrict exp_avg,
                                        S* __restrict exp_avg_sq, int64_t n, const AdamwScalars<wide_t<P>>& scalars) {
  const AdamwScalars<wide_t<P>> s = scalars;
  for (int64_t i = 0; i < n; ++i) {
    const AdamwElement<wide_t<P>> x{widen(param[i]), widen(exp_avg[i]), widen(exp_avg_sq[i])};
    const AdamwElement<wide_t<P>> y = adamw_update(x, widen(grad[i]), s);
    param[i] = narrow<P>(y.param);
    exp_avg[i] = narrow<S>(y.exp_avg);
    exp_avg_sq[i] = narrow<S>(y.exp_avg_sq);
  }
}

#define ADAMW_LOOP(P, S)                                                                      \
  TORCH_FUSED_SIMD void update(P* param, const P* grad, S* exp_avg, S* exp_avg_sq, int64_t n, \
                               const AdamwScalars<wide_t<P>>& scalars) {                      \
    update_elements(param, grad, exp_avg, exp_avg_sq, n, scalars);                            \
  }
ADAMW_LOOP(double, double)
ADAMW_LOOP(float, float)
ADAMW_LOOP(at::Half, at::Half)
ADAMW_LOOP(at::Half, float)
ADAMW_LOOP(at::BFloat16, at::BFloat16)
ADAMW_LOOP(at::BFloat16, float)

template <class P, class S>
void update_chunk(const AdamwTensor& t, const AdamwSettings& settings, int64_t begin, int64_t n) {
  update(elements<P>(t.param) + begin, elements<const P>(t.grad) + begin, elements<S>(t.exp_avg) + begin,
         elements<S>(t.exp_avg_sq) + begin, n, settings.scalars<wide_t<P>>(t.step));
}

void update_chunk(const AdamwTensor& t, const AdamwSettings& settings, int64_t begin, int64_t n) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, t.param.scalar_type(), "adamw_", [&] {
    if (t.exp_avg.scalar_type() == t.param.scalar_type()) {
      update_chunk<scalar_t, scalar_t>(t, settings, begin, n);
    } else if constexpr (sizeof(scalar_t) == 2) {
      update_chunk<scalar_t, float>(t, settings, begin, n);
    }
  });
}

}  // namespace

void adamw_cpu(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs, TensorList steps,
               double lr, double beta1, double beta2, double eps, double weight_decay, bool maximize) {
  const AdamwSettings settings{lr, beta1, beta2, eps, weight_decay, maximize};
  const AdamwCall call(params, grads, exp_avgs, exp_avg_sqs, steps, settings);
  struct Chunk {
    const AdamwTensor* tensor;
    int64_t begin;
  };
  std::vector<Chunk> chunks;
  for (const AdamwTensor& tensor : call.tensors()) {
    for (int64_t begin = 0; begin < tensor.param.numel(); begin += kChunk) chunks.push_back({&tensor, begin});
  }
  at::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const auto [tensor, begin] = chunks[i];
      update_chunk(*tensor, settings, begin, std::min(kChunk, tensor->param.numel() - begin));
    }
  });
  call.finish();
}

// ---- autograd -------------------------------------------------------------------------------------------------------

namespace {

// Not differentiable, but autograd must know what has changed.
void adamw_autograd(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs, TensorList steps,
                    double lr, double beta1, double beta2, double eps, double weight_decay, bool maximize) {
  const std::pair<const char*, TensorList> lists[] = {
      {"params", params}, {"grads", grads}, {"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}, {"steps", steps}};
  for (const auto& [name, list] : lists) {
    for (const Tensor& tensor : list) check_not_differentiated("adamw_", name, tensor);
  }
  static const auto op = find_op<decltype(adamw_cpu)>("torch_fused::adamw_");
  change({params, exp_avgs, exp_avg_sqs, steps},
         [&] { op.call(params, grads, exp_avgs, exp_avg_sqs, steps, lr, beta1, beta2, eps, weight_decay, maximize); });
}

}  // namespace
}  // namespace torch_fused

TORCH_LIBRARY_IMPL(torch_fused, Autograd, m) {
  m.impl("adamw_", torch_fused::adamw_autograd);
}
TORCH_FUSED_WRITES(adamw_)
