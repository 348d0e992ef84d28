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
#include "../common/registration.h"
#include "../common/rows.h"
#include "../common/simd.h"

TORCH_LIBRARY_FRAGMENT(torch_fused, m) {
  m.def(
      "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] steps, Tensor(e!)[] max_exp_avg_sqs, *, float lr=1e-3, float beta1=0.9, float beta2=0.999, "
      "float eps=1e-8, float weight_decay=1e-2, bool maximize=False, bool capturable=False, Tensor? lr_tensor=None, "
      "Tensor? beta1_tensor=None, Tensor? beta2_tensor=None, Tensor? grad_scale=None, Tensor? found_inf=None, "
      "Tensor? grad_squares=None, float? max_grad_norm=None) -> ()");
}

namespace torch_fused {

using at::Tensor;
using at::TensorList;
using OptionalTensor = std::optional<Tensor>;

// ---- checks ---------------------------------------------------------------------------------------------------------

namespace {

void check_value(const char* name, double value, double limit) {
  TORCH_CHECK(value >= 0 && value < limit, "adamw_: ", name, " must be at least 0 and below ", limit, ", got ", value);
}

void check_values(const AdamwOptions& options) {
  constexpr double kLargest = std::numeric_limits<float>::max();
  check_value("lr", options.lr.value, kLargest);
  check_value("beta1", options.beta1.value, 1);
  check_value("beta2", options.beta2.value, 1);
  check_value("eps", options.eps, kLargest);
  check_value("weight_decay", options.weight_decay, kLargest);
  if (options.max_grad_norm) check_value("max_grad_norm", *options.max_grad_norm, kLargest);
}

// A tensor of one number on the device of the parameters or, if `on_cpu_too`, on the CPU.
void check_number(const char* name, const AdamwNumber& number, const Tensor& param, bool on_cpu_too) {
  if (!number.tensor) return;
  const Tensor& tensor = *number.tensor;
  const bool wide = tensor.scalar_type() == at::kDouble && tensor.is_cpu() && (on_cpu_too || !emulating());
  TORCH_CHECK((tensor.scalar_type() == at::kFloat || wide) && tensor.numel() == 1, "adamw_: ", name,
              " must be one float32 (or float64 on the CPU), got ", tensor.numel(), " of ", tensor.scalar_type());
  TORCH_CHECK(tensor.device() == param.device() || (on_cpu_too && tensor.is_cpu()), "adamw_: ", name,
              " must be on the device of params[0], ", param.device(), on_cpu_too ? ", or the CPU, got " : ", got ",
              tensor.device());
}

void check_numbers(const AdamwOptions& options, const Tensor& param) {
  check_number("lr_tensor", options.lr, param, true);
  check_number("beta1_tensor", options.beta1, param, true);
  check_number("beta2_tensor", options.beta2, param, true);
  check_number("grad_scale", options.grad_scale, param, false);
  check_number("found_inf", options.found_inf, param, false);
  check_number("grad_squares", options.grad_squares, param, false);
  TORCH_CHECK(!options.found_inf.tensor || options.capturable,
              "adamw_: found_inf needs capturable=True, as only the device knows whether the step is counted");
  TORCH_CHECK(options.grad_squares.tensor.has_value() == options.max_grad_norm.has_value(),
              "adamw_: max_grad_norm and grad_squares must be given together, got one of them");
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

void check_dtypes(const AdamwArguments& a, size_t i) {
  const at::ScalarType dtype = a.params[i].scalar_type(), state = a.exp_avgs[i].scalar_type();
  TORCH_CHECK(a.grads[i].scalar_type() == dtype, "adamw_: grads[", i, "] must have the dtype of params[", i, "], ",
              dtype, ", got ", a.grads[i].scalar_type());
  TORCH_CHECK(state == dtype || (state == at::kFloat && dtype != at::kDouble), "adamw_: exp_avgs[", i,
              "] must have the dtype of params[", i, "], ", dtype, ", or be float32, got ", state);
  const auto check_state = [&](const char* name, const Tensor& tensor) {
    TORCH_CHECK(tensor.scalar_type() == state, "adamw_: ", name, "[", i, "] must have the dtype of exp_avgs[", i, "], ",
                state, ", got ", tensor.scalar_type());
  };
  check_state("exp_avg_sqs", a.exp_avg_sqs[i]);
  if (!a.max_exp_avg_sqs.empty()) check_state("max_exp_avg_sqs", a.max_exp_avg_sqs[i]);
}

void check_step(const Tensor& step, at::Device device, size_t i) {
  TORCH_CHECK(step.device() == device && step.scalar_type() == at::kFloat && step.numel() == 1, "adamw_: steps[", i,
              "] must be one float32 on ", device.is_cpu() ? "the CPU" : device.str(), ", got ", step.numel(), " of ",
              step.scalar_type(), " on ", step.device());
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

void AdamwNumber::read() {
  if (!tensor) return;
  value = tensor->scalar_type() == at::kDouble ? *elements<const double>(*tensor) : *elements<const float>(*tensor);
  tensor.reset();
}

double AdamwOptions::gradient() const {
  double clip = 1;
  if (max_grad_norm) {
    const double ratio = *max_grad_norm / (std::sqrt(grad_squares.value) / grad_scale.value + 1e-6);
    clip = ratio > 1 ? 1 : ratio;
  }
  return (maximize ? -clip : clip) / grad_scale.value;
}

double next_step(const Tensor& step) {
  return *elements<const float>(step) + 1.0;
}

AdamwCall::AdamwCall(const AdamwArguments& a, bool on_gpu)
    : arguments_(a),
      options_{{a.lr, a.lr_tensor},
               {a.beta1, a.beta1_tensor},
               {a.beta2, a.beta2_tensor},
               a.eps,
               a.weight_decay,
               a.maximize,
               a.capturable,
               {1, a.grad_scale},
               {0, a.found_inf},
               {0, a.grad_squares},
               a.max_grad_norm} {
  const TensorList params = a.params;
  check_length("grads", a.grads, params);
  check_length("exp_avgs", a.exp_avgs, params);
  check_length("exp_avg_sqs", a.exp_avg_sqs, params);
  check_length("steps", a.steps, params);
  if (amsgrad()) check_length("max_exp_avg_sqs", a.max_exp_avg_sqs, params);
  if (!params.empty()) check_numbers(options_, params[0]);
  const std::pair<const char*, AdamwNumber*> numbers[] = {
      {"lr_tensor", &options_.lr},        {"beta1_tensor", &options_.beta1},
      {"beta2_tensor", &options_.beta2},  {"grad_scale", &options_.grad_scale},
      {"found_inf", &options_.found_inf}, {"grad_squares", &options_.grad_squares}};
  MemoryCheck memory("adamw_");
  for (const auto& [name, number] : numbers) {
    if (number->tensor) memory.reads(name, *number->tensor);
  }
  for (size_t i = 0; i < params.size(); ++i) {
    check_param(params[i], params[0], i);
    check_like_param("grads", a.grads[i], params[i], i);
    check_like_param("exp_avgs", a.exp_avgs[i], params[i], i);
    check_like_param("exp_avg_sqs", a.exp_avg_sqs[i], params[i], i);
    if (amsgrad()) check_like_param("max_exp_avg_sqs", a.max_exp_avg_sqs[i], params[i], i);
    check_dtypes(a, i);
    check_step(a.steps[i], options_.capturable ? params[i].device() : at::Device(at::kCPU), i);
    const auto index = static_cast<int64_t>(i);
    memory.writes("params", params[i], index);
    memory.writes("exp_avgs", a.exp_avgs[i], index);
    memory.writes("exp_avg_sqs", a.exp_avg_sqs[i], index);
    if (amsgrad()) memory.writes("max_exp_avg_sqs", a.max_exp_avg_sqs[i], index);
    memory.writes("steps", a.steps[i], index);
    memory.reads("grads", a.grads[i], index);
  }
  for (const auto& [name, number] : numbers) {
    const bool kept = on_gpu && number->tensor && !params.empty() && number->tensor->device() == params[0].device() &&
                      number->tensor->scalar_type() == at::kFloat;
    if (!kept) number->read();
  }
  check_values(options_);
  memory.run();
  tensors_.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) add(i);
}

// A dense parameter is updated in place whatever the order of its dimensions; operands in another order, and parameters
// with gaps, go through a copy.
void AdamwCall::add(size_t i) {
  const Tensor &param = arguments_.params[i], &grad = arguments_.grads[i];
  if (param.numel() == 0) {
    other_steps_.push_back(arguments_.steps[i]);
    return;
  }
  const Tensor places = param.is_non_overlapping_and_dense() ? param : param.contiguous();
  const auto updated = [&](const Tensor& tensor) {
    if (same_places(tensor, places)) return tensor;
    copied_.emplace_back(tensor, copy_to_places_of(places, tensor));
    return copied_.back().second;
  };
  tensors_.push_back({updated(param), same_places(grad, places) ? grad : copy_to_places_of(places, grad),
                      updated(arguments_.exp_avgs[i]), updated(arguments_.exp_avg_sqs[i]),
                      amsgrad() ? updated(arguments_.max_exp_avg_sqs[i]) : Tensor(), arguments_.steps[i]});
}

void AdamwCall::finish(bool count_steps) const {
  for (const auto& [operand, copy] : copied_) operand.copy_(copy);
  if (!count_steps) return;
  for (const Tensor& step : arguments_.steps) *elements<float>(step) += 1;
}

// ---- CPU ------------------------------------------------------------------------------------------------------------

namespace {

constexpr int64_t kChunk = 16384;  // elements a thread takes at a time; a multiple of any cache line

template <bool amsgrad, class P, class S>
TORCH_FUSED_INLINE void update_elements(P* __restrict param, const P* __restrict grad, S* __restrict exp_avg,
                                        S* __restrict exp_avg_sq, S* __restrict max_exp_avg_sq, int64_t n,
                                        const AdamwScalars<wide_t<P>>& scalars) {
  using W = wide_t<P>;
  const AdamwScalars<W> s = scalars;
  for (int64_t i = 0; i < n; ++i) {
    const AdamwElement<W> x{widen(param[i]), widen(exp_avg[i]), widen(exp_avg_sq[i]),
                            amsgrad ? widen(max_exp_avg_sq[i]) : W(0)};
    const AdamwElement<W> y = adamw_update<amsgrad>(x, widen(grad[i]), s);
    param[i] = narrow<P>(y.param);
    exp_avg[i] = narrow<S>(y.exp_avg);
    exp_avg_sq[i] = narrow<S>(y.exp_avg_sq);
    if constexpr (amsgrad) max_exp_avg_sq[i] = narrow<S>(y.max_exp_avg_sq);
  }
}

#define ADAMW_LOOP(P, S)                                                                                      \
  TORCH_FUSED_SIMD void update(P* param, const P* grad, S* exp_avg, S* exp_avg_sq, int64_t n,                 \
                               const AdamwScalars<wide_t<P>>& scalars) {                                      \
    update_elements<false, P, S>(param, grad, exp_avg, exp_avg_sq, nullptr, n, scalars);                      \
  }                                                                                                           \
  TORCH_FUSED_SIMD void update_amsgrad(P* param, const P* grad, S* exp_avg, S* exp_avg_sq, S* max_exp_avg_sq, \
                                       int64_t n, const AdamwScalars<wide_t<P>>& scalars) {                   \
    update_elements<true, P, S>(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, n, scalars);                \
  }
ADAMW_LOOP(double, double)
ADAMW_LOOP(float, float)
ADAMW_LOOP(at::Half, at::Half)
ADAMW_LOOP(at::Half, float)
ADAMW_LOOP(at::BFloat16, at::BFloat16)
ADAMW_LOOP(at::BFloat16, float)

template <class F>
AdamwScalars<F> rounded(const AdamwScalars<double>& s) {
  return {static_cast<F>(s.bias_correction2),
          static_cast<F>(s.negative_step_size),
          static_cast<F>(s.decay),
          static_cast<F>(s.gradient),
          static_cast<F>(s.lerp),
          static_cast<F>(s.beta2),
          static_cast<F>(s.one_minus_beta2),
          static_cast<F>(s.eps)};
}

template <class P, class S>
void update_chunk(const AdamwTensor& t, const AdamwScalars<double>& s, int64_t begin, int64_t n) {
  const auto scalars = rounded<wide_t<P>>(s);
  P* param = elements<P>(t.param) + begin;
  const P* grad = elements<const P>(t.grad) + begin;
  S *exp_avg = elements<S>(t.exp_avg) + begin, *exp_avg_sq = elements<S>(t.exp_avg_sq) + begin;
  if (t.max_exp_avg_sq.defined()) {
    update_amsgrad(param, grad, exp_avg, exp_avg_sq, elements<S>(t.max_exp_avg_sq) + begin, n, scalars);
  } else {
    update(param, grad, exp_avg, exp_avg_sq, n, scalars);
  }
}

void update_chunk(const AdamwTensor& t, const AdamwScalars<double>& s, int64_t begin, int64_t n) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, t.param.scalar_type(), "adamw_", [&] {
    if (t.exp_avg.scalar_type() == t.param.scalar_type()) {
      update_chunk<scalar_t, scalar_t>(t, s, begin, n);
    } else if constexpr (sizeof(scalar_t) == 2) {
      update_chunk<scalar_t, float>(t, s, begin, n);
    }
  });
}

}  // namespace

void update_on_cpu(const AdamwCall& call) {
  if (call.options().found_inf.value != 0) return;
  struct Chunk {
    size_t tensor;
    int64_t begin;
  };
  const std::vector<AdamwTensor>& tensors = call.tensors();
  std::vector<AdamwScalars<double>> scalars;
  scalars.reserve(tensors.size());
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < tensors.size(); ++i) {
    scalars.push_back(call.options().scalars<double>(next_step(tensors[i].step)));
    for (int64_t begin = 0; begin < tensors[i].param.numel(); begin += kChunk) chunks.push_back({i, begin});
  }
  at::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const auto [place, begin] = chunks[i];
      const AdamwTensor& tensor = tensors[place];
      update_chunk(tensor, scalars[place], begin, std::min(kChunk, tensor.param.numel() - begin));
    }
  });
  call.finish(/*count_steps=*/true);
}

// ---- autograd -------------------------------------------------------------------------------------------------------

// Not differentiable, but autograd must know what has changed.
template <class... Args>
void Adamw<void(Args...)>::autograd(Args... args) {
  const AdamwArguments a{args...};
  const std::pair<const char*, TensorList> lists[] = {{"params", a.params},     {"grads", a.grads},
                                                      {"exp_avgs", a.exp_avgs}, {"exp_avg_sqs", a.exp_avg_sqs},
                                                      {"steps", a.steps},       {"max_exp_avg_sqs", a.max_exp_avg_sqs}};
  for (const auto& [name, list] : lists) {
    for (const Tensor& tensor : list) check_not_differentiated("adamw_", name, tensor);
  }
  const std::pair<const char*, const OptionalTensor&> numbers[] = {
      {"lr_tensor", a.lr_tensor},   {"beta1_tensor", a.beta1_tensor}, {"beta2_tensor", a.beta2_tensor},
      {"grad_scale", a.grad_scale}, {"found_inf", a.found_inf},       {"grad_squares", a.grad_squares}};
  for (const auto& [name, number] : numbers) {
    if (number) check_not_differentiated("adamw_", name, *number);
  }
  static const auto op = find_op<AdamwSignature>("torch_fused::adamw_");
  change({a.params, a.exp_avgs, a.exp_avg_sqs, a.steps, a.max_exp_avg_sqs}, [&] { op.call(args...); });
}

}  // namespace torch_fused

TORCH_LIBRARY_IMPL(torch_fused, Autograd, m) {
  m.impl("adamw_", torch_fused::Adamw<torch_fused::AdamwSignature>::autograd);
}
TORCH_FUSED_WRITES(adamw_)
TORCH_FUSED_KERNELS_NAMED(adamw_, adamw)
