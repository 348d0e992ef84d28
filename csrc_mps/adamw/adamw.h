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

struct AdamwLists {
  at::TensorList params, grads, exp_avgs, exp_avg_sqs, steps, max_exp_avg_sqs;
};

// One checked call. The step counters, and operands that had to be copied to be flat, change in finish() only.
class AdamwCall {
 public:
  // Throws if an argument is wrong; the message names it, what it got and what it takes. On a GPU numbers stay in
  // tensors that its kernels can read.
  AdamwCall(const AdamwLists& lists, AdamwOptions options, bool on_gpu);

  const std::vector<AdamwTensor>& tensors() const { return tensors_; }  // those with elements
  const std::vector<at::Tensor>& other_steps() const { return other_steps_; }
  const AdamwOptions& options() const { return options_; }
  bool amsgrad() const { return !lists_.max_exp_avg_sqs.empty(); }
  void finish(bool count_steps) const;

 private:
  void add(size_t i);

  AdamwLists lists_;
  AdamwOptions options_;
  std::vector<AdamwTensor> tensors_;
  std::vector<at::Tensor> other_steps_;                    // of parameters without elements
  std::vector<std::pair<at::Tensor, at::Tensor>> copied_;  // (operand, its copy that is updated)
};

// The number of the step that a counter on the CPU begins.
double next_step(const at::Tensor& step);

void adamw_cpu(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
               at::TensorList steps, at::TensorList max_exp_avg_sqs, double lr, double beta1, double beta2, double eps,
               double weight_decay, bool maximize, bool capturable, const std::optional<at::Tensor>& lr_tensor,
               const std::optional<at::Tensor>& beta1_tensor, const std::optional<at::Tensor>& beta2_tensor,
               const std::optional<at::Tensor>& grad_scale, const std::optional<at::Tensor>& found_inf,
               const std::optional<at::Tensor>& grad_squares, std::optional<double> max_grad_norm);
void adamw_gpu(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
               at::TensorList steps, at::TensorList max_exp_avg_sqs, double lr, double beta1, double beta2, double eps,
               double weight_decay, bool maximize, bool capturable, const std::optional<at::Tensor>& lr_tensor,
               const std::optional<at::Tensor>& beta1_tensor, const std::optional<at::Tensor>& beta2_tensor,
               const std::optional<at::Tensor>& grad_scale, const std::optional<at::Tensor>& found_inf,
               const std::optional<at::Tensor>& grad_squares, std::optional<double> max_grad_norm);

}  // namespace torch_fused
