// AdamW on a GPU: tensors grouped by their types, seven a launch.
#include "adamw.h"

#include <algorithm>
#include <map>

#include "../common/dtype.h"
#include "../common/registration.h"
#include "../common/rows.h"
#include "../runtime/launch.h"
#include "adamw_params.h"

namespace torch_fused {
namespace {

using at::Tensor;
using at::TensorList;

constexpr size_t kTensors = TENSORS;
constexpr int64_t kThreads = THREADS;
constexpr int64_t kPackBytes = 16;  // of a parameter, for each thread

using Batch = at::ArrayRef<AdamwTensor>;

bool is_aligned(const AdamwTensor& t) {
  return rows_aligned(t.param, 0) && rows_aligned(t.grad, 0) && rows_aligned(t.exp_avg, 0) &&
         rows_aligned(t.exp_avg_sq, 0);
}

void launch_batch(const Kernel& kernel, Batch batch, const AdamwSettings& settings) {
  const auto s = settings.scalars<float>(batch[0].step);
  AdamwParams params{{}, {}, 0, {}, {}, s.decay, s.sign, s.lerp, s.beta2, s.one_minus_beta2, s.eps};
  std::vector<Tensor> tensors;
  tensors.reserve(4 * kTensors);
  int64_t threadgroups = 0;
  for (size_t i = 0; i < kTensors; ++i) {
    const AdamwTensor& t = batch[std::min(i, batch.size() - 1)];  // the last once more for those that are not there
    tensors.insert(tensors.end(), {t.param, t.grad, t.exp_avg, t.exp_avg_sq});
    if (i >= batch.size()) {
      params.first[i] = UINT32_MAX;
      continue;
    }
    const int64_t chunk = kThreads * kPackBytes / static_cast<int64_t>(t.param.element_size());
    params.numel[i] = t.param.numel();
    params.first[i] = static_cast<uint32_t>(threadgroups);
    params.aligned |= static_cast<uint32_t>(is_aligned(t)) << i;
    const auto own = settings.scalars<float>(t.step);
    params.bias_correction2[i] = own.bias_correction2;
    params.negative_step_size[i] = own.negative_step_size;
    threadgroups += (t.param.numel() + chunk - 1) / chunk;
  }
  launch(kernel, threadgroups, kThreads, tensors, params);
}

}  // namespace

void adamw_gpu(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs, TensorList steps,
               double lr, double beta1, double beta2, double eps, double weight_decay, bool maximize) {
  const AdamwSettings settings{lr, beta1, beta2, eps, weight_decay, maximize};
  const AdamwCall call(params, grads, exp_avgs, exp_avg_sqs, steps, settings);
  std::map<std::pair<at::ScalarType, at::ScalarType>, std::vector<AdamwTensor>> by_types;
  for (const AdamwTensor& t : call.tensors()) {
    by_types[{t.param.scalar_type(), t.exp_avg.scalar_type()}].push_back(t);
  }
  for (auto& [types, tensors] : by_types) {
    // Large tensors share launches with large ones: each launch waits for the last threadgroup of the one before.
    std::stable_sort(tensors.begin(), tensors.end(),
                     [](const AdamwTensor& a, const AdamwTensor& b) { return a.param.numel() > b.param.numel(); });
    const Kernel& kernel = find_kernel("adamw", "adamw_" + dtype_name(tensors[0].param.scalar_type()) + "_" +
                                                    dtype_name(tensors[0].exp_avg.scalar_type()));
    for (size_t i = 0; i < tensors.size(); i += kTensors) {
      launch_batch(kernel, Batch(tensors).slice(i, std::min(kTensors, tensors.size() - i)), settings);
    }
  }
  call.finish();
}

}  // namespace torch_fused

using namespace torch_fused;
TORCH_FUSED_KERNELS_NAMED(adamw_, adamw)
