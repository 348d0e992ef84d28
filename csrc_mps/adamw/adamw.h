// What adamw.cpp (CPU) and adamw_launch.cpp (GPU) share: the kernels' signatures and the checked call.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "update.h"

namespace torch_fused {

// One parameter as flat memory: all have the same elements in the same places.
struct AdamwTensor {
  at::Tensor param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq;  // the last only with amsgrad
  at::Tensor step;                                              // a number: how often it was updated before
};

// A number of the call, or the tensor that holds it instead.
struct AdamwNumber {
  double value;
  std::optional<at::Tensor> tensor = {};

  // The value of a tensor on the CPU.
  void read();
};

struct AdamwOptions {
  AdamwNumber lr, beta1, beta2;
  double eps, weight_decay;
  bool maximize, capturable;
  AdamwNumber grad_scale, found_inf, grad_squares;
  std::optional<double> max_grad_norm;

  bool is_on_host() const {
    return !capturable && !lr.tensor && !beta1.tensor && !beta2.tensor && !grad_scale.tensor && !found_inf.tensor &&
           !grad_squares.tensor;
  }
  // The gradient's factor, where all is on the host. A norm that is NaN makes it NaN, as in torch.
  double gradient() const;

  template <class F>
  AdamwScalars<F> scalars(double step) const {
    return {static_cast<F>(std::sqrt(1 - std::pow(beta2.value, step))),
            static_cast<F>(-lr.value / (1 - std::pow(beta1.value, step))),
            static_cast<F>(1 - lr.value * weight_decay),
            static_cast<F>(gradient()),
            static_cast<F>(1 - beta1.value),
            static_cast<F>(beta2.value),
            static_cast<F>(1 - beta2.value),
            static_cast<F>(eps)};
  }
};

// What the op is called with, in the order of its schema.
struct AdamwArguments {
  at::TensorList params, grads, exp_avgs, exp_avg_sqs, steps, max_exp_avg_sqs;
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize, capturable;
  std::optional<at::Tensor> lr_tensor, beta1_tensor, beta2_tensor, grad_scale, found_inf, grad_squares;
  std::optional<double> max_grad_norm;
};

// One checked call. The step counters, and operands that had to be copied to be flat, change in finish() only.
class AdamwCall {
 public:
  // Throws if an argument is wrong; the message names it, what it got and what it takes. On a GPU numbers stay in
  // tensors that its kernels can read.
  AdamwCall(const AdamwArguments& arguments, bool on_gpu);

  const std::vector<AdamwTensor>& tensors() const { return tensors_; }  // those with elements
  const std::vector<at::Tensor>& other_steps() const { return other_steps_; }
  const AdamwOptions& options() const { return options_; }
  bool amsgrad() const { return !arguments_.max_exp_avg_sqs.empty(); }
  void finish(bool count_steps) const;

 private:
  void add(size_t i);

  AdamwArguments arguments_;
  AdamwOptions options_;
  std::vector<AdamwTensor> tensors_;
  std::vector<at::Tensor> other_steps_;                    // of parameters without elements
  std::vector<std::pair<at::Tensor, at::Tensor>> copied_;  // (operand, its copy that is updated)
};

// The number of the step that a counter on the CPU begins.
double next_step(const at::Tensor& step);

void update_on_cpu(const AdamwCall& call);
void update_on_gpu(const AdamwCall& call);

// The op as torch calls it, with each of the arguments for itself.
template <class Signature>
struct Adamw;
template <class... Args>
struct Adamw<void(Args...)> {
  static void cpu(Args... args) { update_on_cpu(AdamwCall({args...}, /*on_gpu=*/false)); }
  static void gpu(Args... args) { update_on_gpu(AdamwCall({args...}, /*on_gpu=*/true)); }
  static void autograd(Args... args);
};
using AdamwSignature = void(at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList,
                            at::TensorList, double, double, double, double, double, bool, bool,
                            const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
                            const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
                            const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, std::optional<double>);
inline constexpr auto& adamw_cpu = Adamw<AdamwSignature>::cpu;
inline constexpr auto& adamw_gpu = Adamw<AdamwSignature>::gpu;

}  // namespace torch_fused
