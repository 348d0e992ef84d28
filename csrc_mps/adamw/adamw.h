// What adamw.cpp (CPU) and adamw_launch.cpp (GPU) share: the kernels' signatures and the checked call.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <utility>
#include <vector>

#include "update.h"

namespace torch_fused {

// One parameter as flat memory: all four have the same elements in the same places.
struct AdamwTensor {
  at::Tensor param, grad, exp_avg, exp_avg_sq;
  double step;  // the number of this one, from 1
};

struct AdamwSettings {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;

  template <class F>
  AdamwScalars<F> scalars(double step) const {
    return {static_cast<F>(std::sqrt(1 - std::pow(beta2, step))),
            static_cast<F>(-lr / (1 - std::pow(beta1, step))),
            static_cast<F>(1 - lr * weight_decay),
            static_cast<F>(maximize ? -1 : 1),
            static_cast<F>(1 - beta1),
            static_cast<F>(beta2),
            static_cast<F>(1 - beta2),
            static_cast<F>(eps)};
  }
};

// One checked call. The step counters, and operands that had to be copied to be flat, change in finish() only.
class AdamwCall {
 public:
  // Throws if an argument is wrong; the message names it, what it got and what it takes.
  AdamwCall(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
            at::TensorList steps, const AdamwSettings& settings);

  const std::vector<AdamwTensor>& tensors() const { return tensors_; }  // those with elements
  void finish() const;

 private:
  void add(const at::Tensor& param, const at::Tensor& grad, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
           const at::Tensor& step);

  std::vector<AdamwTensor> tensors_;
  std::vector<std::pair<at::Tensor, at::Tensor>> copied_;  // (operand, its copy that is updated)
  at::TensorList steps_;
};

void adamw_cpu(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
               at::TensorList steps, double lr, double beta1, double beta2, double eps, double weight_decay,
               bool maximize);
void adamw_gpu(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
               at::TensorList steps, double lr, double beta1, double beta2, double eps, double weight_decay,
               bool maximize);

}  // namespace torch_fused
