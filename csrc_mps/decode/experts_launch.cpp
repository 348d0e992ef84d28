// The launches of a mixture of experts in a decode step on a GPU.
#include <algorithm>

#include "../common/rows.h"
#include "../common/torch_functions.h"
#include "gpu_step.h"

namespace torch_fused {
namespace {

using at::Tensor;

struct ExpertsProduct {
  const Tensor &gate, &up;  // alike unless it gates
  const Tensor& from;
  const OptionalTensor& norm;
  const Tensor& to;
  int64_t shared_by;  // experts that use the same vector
};

// Of each token's experts, given by `experts` (tokens, chosen).
void multiply_experts(GpuStep& step, const ExpertsProduct& v, const Tensor& experts, bool gated) {
  static KernelSet plain("decode_experts", "decode_experts"), gating("decode_experts", "decode_experts_gated");
  const DecoderNumbers& n = step.model.numbers;
  const at::ScalarType dtype = v.gate.scalar_type();
  const auto whole_rows = [](const Tensor& all) {
    return rows_aligned(all, all.stride(1)) && rows_aligned(all, all.stride(0));
  };
  const bool whole = whole_rows(v.gate) && whole_rows(v.up) && v.gate.size(2) % kLaneColumns == 0 &&
                     (!v.norm || (v.norm->scalar_type() == dtype && rows_aligned(*v.norm, 0)));
  ExpertsParams p{};
  ProductParams& q = p.product;
  q.strides[0] = v.gate.stride(1), q.strides[1] = v.up.stride(1);
  std::fill(std::begin(q.ends), std::end(q.ends), static_cast<uint32_t>(v.gate.size(1)));
  q.cols = static_cast<uint32_t>(v.gate.size(2));
  q.result_stride = static_cast<uint32_t>(v.gate.size(1));
  q.vectors = q.steps = q.kept = q.splits = 1;
  q.flags = v.norm ? kNormed : 0;
  q.norm_format = v.norm ? format_of(*v.norm) : 0;
  q.eps = static_cast<float>(n.eps);
  q.norm_offset = static_cast<float>(n.norm_offset);
  q.scale = 1;
  q.activation = step.model.activation;
  p.expert_strides[0] = v.gate.stride(0), p.expert_strides[1] = v.up.stride(0);
  const int64_t outputs = kProductSimdgroups * (gated && !whole ? 1 : 2);
  p.groups = static_cast<uint32_t>((v.gate.size(1) + outputs - 1) / outputs);
  p.shared_by = static_cast<uint32_t>(v.shared_by);
  step.launches.add((gated ? gating : plain)(dtype, whole ? 1 : 0), experts.numel() * p.groups, 32 * kProductSimdgroups,
                    {v.gate, v.up, experts, v.from, v.norm ? *v.norm : step.model.norm, v.to}, p);
}

}  // namespace

void feed_forward_of_experts(GpuStep& step, const DecoderLayer& layer) {
  static const Kernel& choose = find_kernel("decode_experts", "decode_choose");
  static const Kernel& sum = find_kernel("decode_experts", "decode_expert_sum");
  const Decoder& model = step.model;
  const OptionalTensor& norm = layer.post_attention_norm;
  const int64_t steps = step.call.steps, tokens = step.call.tokens(), chosen = model.numbers.chosen();
  const bool shared = layer.has_feed_forward(), shared_gate = layer.shared_gate.rows() > 0;
  const int64_t experts = layer.experts(), routes_size = experts + (shared_gate ? 1 : 0);
  const auto floats = step.states.options();
  const Tensor routes = empty({tokens, routes_size}, floats), weights = empty({tokens, chosen}, floats);
  const Tensor ids = empty({tokens, chosen}, floats.dtype(at::kInt));
  const Tensor gates = empty({tokens * chosen, layer.experts_gate.size(1)}, floats);
  const Tensor outputs = empty({tokens * chosen, model.hidden}, floats);

  multiply(step, {&layer.router}, {step.states, routes.narrow(1, 0, experts), norm, steps, steps, false}, false);
  if (shared_gate) {
    multiply(step, {&layer.shared_gate}, {step.states, routes.narrow(1, experts, 1), norm, steps, steps, false}, false);
  }
  const ChooseParams c{static_cast<uint32_t>(experts), static_cast<uint32_t>(chosen),
                       static_cast<uint32_t>(routes_size), model.numbers.normalise_experts != 0};
  step.launches.add(choose, tokens, 32, {routes, ids, weights}, c);
  multiply_experts(step, {layer.experts_gate, layer.experts_up, step.states, norm, gates, chosen}, ids, true);
  multiply_experts(step, {layer.experts_down, layer.experts_down, gates, {}, outputs, 1}, ids, false);
  if (shared) feed_forward(step, layer, step.output, false, 1);
  const ExpertSumParams s{static_cast<uint32_t>(model.hidden),
                          static_cast<uint32_t>(chosen),
                          (shared ? kSharedExpert : 0) | (shared_gate ? kSharedGate : 0),
                          static_cast<uint32_t>(routes_size),
                          static_cast<uint32_t>(experts),
                          static_cast<float>(model.numbers.residual_scale)};
  step.launches.add(sum, tokens, 256, {outputs, weights, step.output, routes, step.states}, s);
}

}  // namespace torch_fused
