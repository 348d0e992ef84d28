// A decode step on a GPU: five launches a layer, one for the embedding and one for the head.
#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "../common/checks.h"
#include "../common/rows.h"
#include "../common/torch_functions.h"
#include "gpu_step.h"

namespace torch_fused {
namespace {

using at::Tensor;

constexpr int64_t kFewSlots = 32;    // of the context: a chunk of attention has at least as many
constexpr int64_t kMostChunks = 32;  // more cost more to put together than they save
constexpr int64_t kFewGroups = 16;   // threadgroups of attention; where there are more anyway, chunks are larger
constexpr int64_t kFewOfBatch = 4;   // and in a batch, where putting chunks together costs each sequence
constexpr int64_t kGroups = 128;     // and so many fill a GPU

constexpr size_t kUsualLaunches = 5;  // of a layer
constexpr int64_t kAlignment = 64;    // floats: what lies side by side shares no cache line
// More than 1 MB, which torch allocates apart from small tensors: at the same place as in the step before, so that a
// graph's launches keep their arguments.
constexpr int64_t kLeastFloats = (1 << 18) + kAlignment;

// Rows of these widths, one for each token, in one block.
template <size_t N>
std::array<Tensor, N> rows_of(const std::array<int64_t, N>& widths, int64_t tokens, const at::TensorOptions& floats) {
  std::array<int64_t, N + 1> begins{};
  for (size_t i = 0; i < N; ++i) {
    begins[i + 1] = begins[i] + (tokens * widths[i] + kAlignment - 1) / kAlignment * kAlignment;
  }
  const Tensor block = empty({std::max(begins[N], kLeastFloats)}, floats);
  std::array<Tensor, N> rows;
  for (size_t i = 0; i < N; ++i) rows[i] = block.as_strided({tokens, widths[i]}, {widths[i], 1}, begins[i]);
  return rows;
}

// Queries of a key/value head that attention takes at once, each with a team of simdgroups.
int64_t teams_of(const Decoder& model, int64_t steps) {
  const int64_t queries = model.heads / model.kv_heads * steps;
  return queries > 4 ? kMostTeams : queries > 2 ? 4 : queries;
}

// Slots that a team attends at once. A chunk of the context with fewer would leave simdgroups idle.
int64_t slots_at_once(const Decoder& model, int64_t steps) {
  const bool fast = model.head_dim == 64 || model.head_dim == 128;
  const int64_t keys = fast ? 32 * kLaneColumns / model.head_dim * kKeysAtOnce : 1;
  return std::max(kFewSlots, kAttentionSimdgroups / teams_of(model, steps) * keys);
}

// What the adapters of a matrix add to its product; `multiply_a` is the product with the first matrix of one.
template <class Function>
void add_adapters(GpuStep& step, const Linear& matrix, const Tensor& to, double scale, const Function& multiply_a) {
  const int64_t steps = step.call.steps;
  for (const Adapter& adapter : matrix.adapters) {
    const Tensor thin = empty({step.call.tokens(), adapter.a.rows()}, step.states.options());
    multiply_a(adapter.a, thin);
    multiply(step, {&adapter.b}, {thin, to, {}, steps, steps, true, scale * adapter.scale}, false);
  }
}

// And of one whose vectors are normed before.
void add_adapters(GpuStep& step, const Linear& matrix, const OptionalTensor& norm, const Tensor& to) {
  const int64_t steps = step.call.steps;
  add_adapters(step, matrix, to, 1, [&](const Linear& a, const Tensor& thin) {
    multiply(step, {&a}, {step.states, thin, norm, steps, steps, false}, false);
  });
}

// Each on its own where their formats differ.
void multiply_qkv(GpuStep& step, const DecoderLayer& layer) {
  const StepVectors v{step.states, step.qkv, layer.input_norm, step.call.steps, step.call.steps, false};
  const auto alike = [](const Linear& a, const Linear& b) {
    return a.is_like(b) && (!a.bias || !b.bias || a.bias->scalar_type() == b.bias->scalar_type());
  };
  const bool together = alike(layer.q, layer.k) && alike(layer.q, layer.v) && alike(layer.k, layer.v);
  if (together) multiply(step, {&layer.q, &layer.k, &layer.v}, v, false);
  int64_t first = 0;
  for (const Linear* matrix : {&layer.q, &layer.k, &layer.v}) {
    const int64_t rows = matrix->rows();
    if (!together || !matrix->adapters.empty()) {  // a view takes a microsecond, which counts here
      const Tensor results = step.qkv.narrow(1, first, rows);
      if (!together) multiply(step, {matrix}, {v.from, results, v.norm, v.steps, v.kept, false}, false);
      add_adapters(step, *matrix, v.norm, results);
    }
    first += rows;
  }
}

// The norm of each head, if there is one.
OptionalTensor norm_of_each(const OptionalTensor& norm, const Decoder& model) {
  return norm && norm->size(0) == model.head_dim ? norm : std::nullopt;
}

// Norms of all heads of queries or keys as one, in place.
void norm_heads(GpuStep& step, const DecoderLayer& layer) {
  const auto apply = [&](const OptionalTensor& norm, int64_t first) {
    if (!norm || norm->size(0) == step.model.head_dim) return;
    const Tensor rows = step.qkv.narrow(1, first, norm->size(0));
    norm_rows(step, rows, *norm, rows, false, 1);
  };
  apply(layer.q_norm, 0);
  apply(layer.k_norm, step.model.heads * step.model.head_dim);
}

void attend(GpuStep& step, size_t index) {
  static KernelSet any("decode_attention", "decode_attention"), dim_64("decode_attention", "decode_attention_64"),
      dim_128("decode_attention", "decode_attention_128");
  const DecodeCall& call = step.call;
  const Decoder& model = step.model;
  const DecoderLayer& layer = model.layers[index];
  const Tensor &keys = call.keys[index], &values = call.values[index];
  AttentionParams p{};
  p.keys_batch = keys.stride(0), p.keys_head = keys.stride(1);
  p.values_batch = values.stride(0), p.values_head = values.stride(1);
  p.keys_slot = kernel_size("decode_", "elements between the slots of keys", keys.stride(2));
  p.values_slot = kernel_size("decode_", "elements between the slots of values", values.stride(2));
  p.length = kernel_size("decode_", "tokens", call.length + call.steps) - static_cast<uint32_t>(call.steps);
  p.dropped = static_cast<uint32_t>(call.dropped_of(index));
  p.window = static_cast<uint32_t>(std::min<int64_t>(layer.window, call.length + call.steps));
  p.steps = static_cast<uint32_t>(call.steps);
  p.heads = static_cast<uint32_t>(model.heads);
  p.kv_heads = static_cast<uint32_t>(model.kv_heads);
  p.head_dim = static_cast<uint32_t>(model.head_dim);
  const Tensor cos = call.table_of(call.cos, layer), sin = call.table_of(call.sin, layer);
  p.rotary_dim = static_cast<uint32_t>(call.rotary_dim_of(layer));
  p.positions = static_cast<uint32_t>(cos.size(0));
  p.teams = static_cast<uint32_t>(teams_of(model, call.steps));
  p.chunks = static_cast<uint32_t>(step.chunks);
  p.table_format = format_of(cos);
  p.eps = static_cast<float>(model.numbers.eps);
  p.norm_offset = static_cast<float>(model.numbers.norm_offset);
  p.scaling = static_cast<float>(model.numbers.scaling / std::log(2.0));
  p.softcap = static_cast<float>(model.numbers.attention_softcap / std::log(2.0));
  const at::ScalarType dtype = keys.scalar_type();
  const auto aligned = [&](const Tensor& t) {
    return rows_aligned(t, t.stride(0)) && rows_aligned(t, t.stride(1)) && rows_aligned(t, t.stride(2));
  };
  const OptionalTensor q_norm = norm_of_each(layer.q_norm, model), k_norm = norm_of_each(layer.k_norm, model);
  const auto alike = [&](const OptionalTensor& t) { return !t || t->scalar_type() == dtype; };
  const bool whole = aligned(keys) && aligned(values) && alike(q_norm) && alike(k_norm) && alike(cos);
  if (call.starts) p.flags |= kStarts;
  if (q_norm) p.flags |= kQueryNorm, p.q_norm_format = format_of(*q_norm);
  if (k_norm) p.flags |= kKeyNorm, p.k_norm_format = format_of(*k_norm);
  KernelSet* kernels = !whole || model.head_dim % 64 > 0 ? &any : model.head_dim == 64 ? &dim_64 : &dim_128;
  if (model.head_dim > 128) kernels = &any;
  step.launches.add((*kernels)(dtype), call.batch * model.kv_heads * step.chunks, 32 * kAttentionSimdgroups,
                    {step.qkv, keys, values, q_norm ? *q_norm : cos, k_norm ? *k_norm : cos, cos, sin, call.positions,
                     call.starts ? *call.starts : call.positions, step.attended, step.stats},
                    p);
}

}  // namespace

void feed_forward(GpuStep& step, const DecoderLayer& layer, const Tensor& to, bool add, double scale) {
  const int64_t steps = step.call.steps, tokens = step.call.tokens(), size = layer.gate.rows();
  const OptionalTensor& norm = layer.post_attention_norm;
  const auto part = [&](const Tensor& memory) {
    return memory.size(1) == size ? memory : memory.flatten().narrow(0, 0, tokens * size).view({tokens, size});
  };
  const Tensor gates = part(step.gates);
  if (layer.gate.adapters.empty() && layer.up.adapters.empty()) {
    multiply(step, {&layer.gate, &layer.up}, {step.states, gates, norm, steps, steps, false}, true);
  } else {
    if (!step.ups.defined()) step.ups = empty(step.gates.sizes(), step.gates.options());
    const Tensor ups = part(step.ups);
    for (const auto& [matrix, results] : {std::pair(&layer.gate, gates), std::pair(&layer.up, ups)}) {
      multiply(step, {matrix}, {step.states, results, norm, steps, steps, false}, false);
      add_adapters(step, *matrix, norm, results);
    }
    gate(step, gates, ups);
  }
  multiply(step, {&layer.down}, {gates, to, {}, steps, steps, add, scale}, false);
  add_adapters(step, layer.down, to, scale, [&](const Linear& a, const Tensor& thin) {
    multiply(step, {&a}, {gates, thin, {}, steps, steps, false}, false);
  });
}

Tensor decode_gpu(const DecoderPtr& decoder, const Tensor& token_ids, const Tensor& positions,
                  const OptionalTensor& starts, const Tensor& cos, const Tensor& sin, at::TensorList keys,
                  at::TensorList values, int64_t length, int64_t logits_to_keep, at::IntArrayRef dropped) {
  const DecodeCall call =
      check_decode(decoder, token_ids, positions, starts, cos, sin, keys, values, length, logits_to_keep, dropped);
  const Decoder& model = *decoder;
  TORCH_CHECK(model.head_dim <= kMostHeadDim, "decode_: on a GPU heads have at most ", kMostHeadDim,
              " dimensions, got ", model.head_dim);
  const auto floats = model.norm.options().dtype(at::kFloat);
  const int64_t tokens = call.tokens(), heads = model.heads, dim = model.head_dim;
  const int64_t groups = call.batch * model.kv_heads;
  const int64_t most_chunks = std::clamp<int64_t>(kGroups / groups, 1, kMostChunks);
  const int64_t few = call.batch > 1 ? kFewOfBatch : kFewGroups;
  const int64_t slots = slots_at_once(model, call.steps) * std::max<int64_t>(1, groups / few);
  // A single chunk may have twice as many: it is not put together with others.
  const int64_t needed = call.length < 2 * slots ? 1 : (call.length + call.steps + slots - 1) / slots;
  const int64_t chunks = std::min(needed, most_chunks);
  const std::array<int64_t, 6> widths{model.hidden,         model.hidden,       call.projected(),
                                      heads * chunks * dim, heads * chunks * 2, model.intermediate};
  const auto [states, output, qkv, attended, stats, gates] = rows_of(widths, tokens, floats);
  const Tensor logits = empty({call.batch, call.kept, model.vocabulary}, floats);
  GpuStep step{call, model, states, output, qkv, attended, stats, gates, {}, logits, chunks, {}};
  step.launches.reserve(model.layers.size() * kUsualLaunches + 2);
  embed(step);
  const int64_t steps = call.steps;
  const double scale = model.numbers.residual_scale;
  for (size_t i = 0; i < model.layers.size(); ++i) {
    const DecoderLayer& layer = model.layers[i];
    multiply_qkv(step, layer);
    norm_heads(step, layer);
    attend(step, i);
    // With a norm the output goes to the states when all of it is there.
    const auto add_output = [&](const OptionalTensor& norm, const auto& product) {
      if (!norm) return product(step.states, true, scale);
      product(step.output, false, 1.0);
      norm_rows(step, step.output, *norm, step.states, true, scale);
    };
    add_output(layer.attention_output_norm, [&](const Tensor& to, bool add, double by) {
      multiply_attended(step, layer.o, to, add, by);
      add_adapters(step, layer.o, to, by,
                   [&](const Linear& a, const Tensor& thin) { multiply_attended(step, a, thin, false, 1); });
    });
    if (layer.has_experts()) {
      feed_forward_of_experts(step, layer);
    } else {
      add_output(layer.feed_forward_output_norm,
                 [&](const Tensor& to, bool add, double by) { feed_forward(step, layer, to, add, by); });
    }
  }
  multiply(step, {&model.head}, {step.states, step.logits, model.norm, steps, call.kept, false}, false);
  step.launches.run(model.repeats);
  finish_logits(model, step.logits);
  return step.logits;
}

}  // namespace torch_fused
