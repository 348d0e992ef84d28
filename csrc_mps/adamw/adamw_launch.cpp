// AdamW on a GPU: tensors grouped by their types, seven a launch, or five with amsgrad.
#include "adamw.h"

#include <algorithm>
#include <map>

#include "../common/dtype.h"
#include "../common/rows.h"
#include "../common/torch_functions.h"
#include "../runtime/launch.h"
#include "adamw_params.h"

namespace torch_fused {
namespace {

using at::Tensor;

constexpr int64_t kThreads = THREADS;
constexpr int64_t kPackBytes = 16;  // of a parameter, for each thread

using Batch = at::ArrayRef<AdamwTensor>;

bool is_aligned(const AdamwTensor& t) {
  return rows_aligned(t.param, 0) && rows_aligned(t.grad, 0) && rows_aligned(t.exp_avg, 0) &&
         rows_aligned(t.exp_avg_sq, 0) && (!t.max_exp_avg_sq.defined() || rows_aligned(t.max_exp_avg_sq, 0));
}

// How the tensors of a call share launches.
struct Batches {
  std::vector<std::vector<AdamwTensor>> by_types;

  explicit Batches(const std::vector<AdamwTensor>& tensors) {
    std::map<std::pair<at::ScalarType, at::ScalarType>, std::vector<AdamwTensor>> groups;
    for (const AdamwTensor& t : tensors) groups[{t.param.scalar_type(), t.exp_avg.scalar_type()}].push_back(t);
    for (auto& [types, group] : groups) {
      // Large tensors share launches with large ones: each launch waits for the last threadgroup of the one before.
      std::stable_sort(group.begin(), group.end(),
                       [](const AdamwTensor& a, const AdamwTensor& b) { return a.param.numel() > b.param.numel(); });
      by_types.push_back(std::move(group));
    }
  }
};

// What each tensor is updated with, made on the GPU: in the order of the batches. Counts the steps that are there.
Tensor make_numbers(const AdamwCall& call, const Batches& batches) {
  std::vector<Tensor> steps;
  for (const auto& group : batches.by_types) {
    for (const AdamwTensor& t : group) steps.push_back(t.step);
  }
  const AdamwOptions& o = call.options();
  if (o.capturable) steps.insert(steps.end(), call.other_steps().begin(), call.other_steps().end());
  if (steps.empty()) return {};
  const auto& some = call.tensors().empty() ? steps[0] : call.tensors()[0].param;
  const int64_t size = sizeof(AdamwNumbers) / sizeof(float);
  const Tensor numbers = empty({static_cast<int64_t>(steps.size()), size}, some.options().dtype(at::kFloat));
  const auto or_any = [&](const AdamwNumber& number) { return number.tensor ? *number.tensor : numbers; };
  const auto flag = [](bool is, uint32_t bit) { return is ? bit : 0; };
  const auto high = [](double value) { return static_cast<float>(value); };
  const auto low = [](double value) { return static_cast<float>(value - static_cast<float>(value)); };
  AdamwNumbersParams params{};
  params.flags = flag(o.capturable, STEPS_ON_DEVICE) | flag(o.lr.tensor.has_value(), HAS_LR) |
                 flag(o.beta1.tensor.has_value(), HAS_BETA1) | flag(o.beta2.tensor.has_value(), HAS_BETA2) |
                 flag(o.grad_scale.tensor.has_value(), HAS_GRAD_SCALE) |
                 flag(o.found_inf.tensor.has_value(), HAS_FOUND_INF) | flag(o.max_grad_norm.has_value(), CLIPS);
  params.lr = high(o.lr.value);
  params.beta1 = high(o.beta1.value);
  params.beta1_low = low(o.beta1.value);
  params.beta2 = high(o.beta2.value);
  params.beta2_low = low(o.beta2.value);
  params.lerp = high(1 - o.beta1.value);
  params.one_minus_beta2 = high(1 - o.beta2.value);
  params.sign = o.maximize ? -1.0f : 1.0f;
  params.max_grad_norm = high(o.max_grad_norm.value_or(0));
  params.weight_decay = high(o.weight_decay);
  params.eps = high(o.eps);
  static const Kernel& kernel = find_kernel("adamw_numbers", "adamw_numbers");
  for (size_t first = 0; first < steps.size(); first += STEPS) {
    params.first_number = static_cast<uint32_t>(first);
    params.tensors = static_cast<uint32_t>(std::min<size_t>(STEPS, steps.size() - first));
    std::vector<Tensor> tensors(STEPS, numbers);
    for (uint32_t i = 0; i < params.tensors; ++i) {
      if (o.capturable) {
        tensors[i] = steps[first + i];
      } else {
        params.steps[i] = static_cast<float>(next_step(steps[first + i]));
      }
    }
    tensors.insert(tensors.end(), {or_any(o.lr), or_any(o.beta1), or_any(o.beta2), or_any(o.grad_scale),
                                   or_any(o.found_inf), or_any(o.grad_squares), numbers});
    launch(kernel, 1, 32, tensors, params);
  }
  return numbers;
}

// `numbers`, if defined, has what the batch is updated with from `first_number` on.
void launch_batch(const Kernel& kernel, Batch batch, size_t most, const AdamwOptions& options, const Tensor& numbers,
                  size_t first_number) {
  AdamwParams params{};
  params.has_numbers = numbers.defined() ? 1 : 0;
  params.first_number = static_cast<uint32_t>(first_number);
  if (!numbers.defined()) {
    const auto s = options.scalars<float>(1);
    params.decay = s.decay;
    params.gradient = s.gradient;
    params.lerp = s.lerp;
    params.beta2 = s.beta2;
    params.one_minus_beta2 = s.one_minus_beta2;
    params.eps = s.eps;
  }
  std::fill(std::begin(params.first), std::end(params.first), UINT32_MAX);
  std::vector<Tensor> tensors;
  tensors.reserve(kMaxBuffers);
  int64_t threadgroups = 0;
  for (size_t i = 0; i < most; ++i) {
    const AdamwTensor& t = batch[std::min(i, batch.size() - 1)];  // the last once more for those that are not there
    tensors.insert(tensors.end(), {t.param, t.grad, t.exp_avg, t.exp_avg_sq});
    if (t.max_exp_avg_sq.defined()) tensors.push_back(t.max_exp_avg_sq);
    if (i >= batch.size()) continue;
    const int64_t chunk = kThreads * kPackBytes / static_cast<int64_t>(t.param.element_size());
    params.numel[i] = t.param.numel();
    params.first[i] = static_cast<uint32_t>(threadgroups);
    params.aligned |= static_cast<uint32_t>(is_aligned(t)) << i;
    if (!numbers.defined()) {
      const auto own = options.scalars<float>(next_step(t.step));
      params.bias_correction2[i] = own.bias_correction2;
      params.negative_step_size[i] = own.negative_step_size;
    }
    threadgroups += (t.param.numel() + chunk - 1) / chunk;
  }
  tensors.push_back(numbers.defined() ? numbers : batch[0].param);
  launch(kernel, threadgroups, kThreads, tensors, params);
}

}  // namespace

void update_on_gpu(const AdamwCall& call) {
  const Batches batches(call.tensors());
  const bool on_host = call.options().is_on_host() && !call.amsgrad();
  const Tensor numbers = on_host ? Tensor() : make_numbers(call, batches);
  const size_t most = call.amsgrad() ? AMSGRAD_TENSORS : TENSORS;
  const std::string source = call.amsgrad() ? "adamw_amsgrad" : "adamw";
  size_t first = 0;
  for (const auto& group : batches.by_types) {
    const Kernel& kernel = find_kernel(source, source + "_" + dtype_name(group[0].param.scalar_type()) + "_" +
                                                   dtype_name(group[0].exp_avg.scalar_type()));
    for (size_t i = 0; i < group.size(); i += most) {
      const size_t count = std::min(most, group.size() - i);
      launch_batch(kernel, Batch(group).slice(i, count), most, call.options(), numbers, first);
      first += count;
    }
  }
  call.finish(/*count_steps=*/!call.options().capturable);
}

}  // namespace torch_fused
