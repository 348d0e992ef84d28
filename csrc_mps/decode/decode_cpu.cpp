// A decode step on the CPU: the model for the loops of step/, their memory, and the instruction set.
#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <algorithm>
#include <iterator>
#include <numeric>
#include <string>

#include "../common/rows.h"
#include "../common/torch_functions.h"
#include "cpu_step.h"
#include "decode.h"

namespace torch_fused {

using at::Tensor;
using at::TensorList;

namespace {

constexpr int64_t kChunk = 64;  // minimum number of slots in a chunk of the context

Vector vector_of(const OptionalTensor& tensor) {
  return tensor ? Vector{tensor->const_data_ptr(), format_of(*tensor)} : Vector{nullptr, 0};
}

// `int8`: the rows may be multiplied as integers. Of 8 bits in groups of 32 that is hardly faster than as floats.
Matrix matrix_of(const Linear& linear, bool int8) {
  if (linear.rows() == 0) return {};
  const Tensor& w = linear.weight;
  Matrix matrix{w.const_data_ptr(), 0, linear.rows(), linear.cols, w.stride(0), vector_of(linear.bias), {}, false, {}};
  if (linear.is_packed()) {
    matrix.packed = PackedMatrix{elements<const uint32_t>(w),
                                 linear.scales.const_data_ptr(),
                                 linear.group_biases.const_data_ptr(),
                                 format_of(linear.scales),
                                 linear.cols,
                                 linear.bits,
                                 linear.group_size,
                                 w.stride(0),
                                 linear.scales.stride(0),
                                 linear.group_biases.stride(0),
                                 linear.rows()};
    matrix.int8 = int8 && !(linear.bits == 8 && linear.group_size == 32);
  } else {
    matrix.format = format_of(w);
  }
  for (const Adapter& adapter : linear.adapters) {
    matrix.adapters.push_back(
        {matrix_of(adapter.a, false), matrix_of(adapter.b, false), static_cast<float>(adapter.scale)});
  }
  return matrix;
}

CacheStates<void> states_of(const Tensor& buffer, int64_t first) {
  return {buffer.mutable_data_ptr(), buffer.stride(0), buffer.stride(1), buffer.stride(2), first};
}

// The value projection is multiplied as floats: it is small, and attention does not reduce its errors.
Experts experts_of(const Tensor& all) {
  if (!all.defined()) return {};
  return {{all.const_data_ptr(), format_of(all), all.size(1), all.size(2), all.stride(1), {}, {}, false, {}},
          all.stride(0) * static_cast<int64_t>(all.element_size())};
}

StepLayer layer_of(const DecodeCall& call, size_t index) {
  const DecoderLayer& layer = call.model.layers[index];
  const bool int8 = call.model.int8_products;
  StepLayer l{};
  l.input_norm = vector_of(layer.input_norm);
  l.q = matrix_of(layer.q, int8);
  l.k = matrix_of(layer.k, int8);
  l.v = matrix_of(layer.v, false);
  l.o = matrix_of(layer.o, int8);
  l.q_norm = vector_of(layer.q_norm);
  l.k_norm = vector_of(layer.k_norm);
  l.q_norm_size = layer.q_norm ? layer.q_norm->size(0) : 0;
  l.k_norm_size = layer.k_norm ? layer.k_norm->size(0) : 0;
  l.attention_output_norm = vector_of(layer.attention_output_norm);
  l.post_attention_norm = vector_of(layer.post_attention_norm);
  l.gate = matrix_of(layer.gate, int8);
  l.up = matrix_of(layer.up, int8);
  l.down = matrix_of(layer.down, int8);
  l.feed_forward_output_norm = vector_of(layer.feed_forward_output_norm);
  l.router = matrix_of(layer.router, false);
  l.shared_gate = matrix_of(layer.shared_gate, false);
  l.experts_gate = experts_of(layer.experts_gate);
  l.experts_up = experts_of(layer.experts_up);
  l.experts_down = experts_of(layer.experts_down);
  l.keys = states_of(call.keys[index], call.dropped_of(index));
  l.values = states_of(call.values[index], call.dropped_of(index));
  l.window = layer.window;
  l.cos = vector_of(call.table_of(call.cos, layer));
  l.sin = vector_of(call.table_of(call.sin, layer));
  l.rotary_dim = call.rotary_dim_of(layer);
  return l;
}

// Enough chunks to give all threads equal work, if the context is long enough.
int64_t count_chunks(const StepShape& s) {
  const int64_t heads = s.batch * s.kv_heads, even = s.threads / std::gcd(heads, s.threads);
  const int64_t wanted = (4 * s.threads + heads - 1) / heads, most = s.length / kChunk;
  const int64_t chunks = std::min((wanted + even - 1) / even * even, most);
  return chunks >= even ? chunks / even * even : std::max<int64_t>(1, chunks);
}

// With the best instructions that the machine has, or that ATEN_CPU_CAPABILITY allows.
void run_step(const CpuStep& step, const Team& team) {
#ifdef TORCH_FUSED_X86_DISPATCH
  static const std::string allowed = at::get_cpu_capability();
  if (allowed == "AVX512" && __builtin_cpu_supports("x86-64-v4")) return avx512::run_step(step, team);
  if (allowed != "DEFAULT" && __builtin_cpu_supports("x86-64-v3")) return avx2::run_step(step, team);
#endif
  baseline::run_step(step, team);
}

}  // namespace

Tensor decode_cpu(const DecoderPtr& model, const Tensor& token_ids, const Tensor& positions,
                  const OptionalTensor& starts, const Tensor& cos, const Tensor& sin, TensorList keys,
                  TensorList values, int64_t length, int64_t logits_to_keep, at::IntArrayRef dropped) {
  const DecodeCall call =
      check_decode(model, token_ids, positions, starts, cos, sin, keys, values, length, logits_to_keep, dropped);
  const Decoder& m = *model;
  CpuStep s{};
  s.batch = call.batch;
  s.steps = call.steps;
  s.hidden = m.hidden;
  s.heads = m.heads;
  s.kv_heads = m.kv_heads;
  s.head_dim = m.head_dim;
  s.chosen = m.experts > 0 ? m.numbers.chosen() : 0;
  s.normalise_experts = m.numbers.normalise_experts != 0;
  s.experts = m.experts;
  s.intermediate = m.intermediate + s.chosen * m.expert_intermediate;
  s.most_cols = std::max({m.hidden, m.heads * m.head_dim, m.intermediate});
  s.vocabulary = m.vocabulary;
  s.length = call.length;
  s.kept = call.kept;
  s.threads = team_size();
  s.chunks = count_chunks(s);
  s.token_ids = elements<const int64_t>(token_ids);
  s.positions = elements<const int64_t>(positions);
  s.starts = starts ? elements<const int64_t>(*starts) : nullptr;
  s.embedding = matrix_of(m.embedding, false);
  s.layers.reserve(m.layers.size());
  for (size_t i = 0; i < m.layers.size(); ++i) s.layers.push_back(layer_of(call, i));
  s.cache_format = format_of(keys[0]);
  s.norm = vector_of(m.norm);
  s.head = matrix_of(m.head, m.int8_products);
  s.activation = m.activation;
  s.eps = static_cast<float>(m.numbers.eps);
  s.scaling = static_cast<float>(m.numbers.scaling);
  s.norm_offset = static_cast<float>(m.numbers.norm_offset);
  s.embedding_scale = static_cast<float>(m.numbers.embedding_scale);
  s.residual_scale = static_cast<float>(m.numbers.residual_scale);
  s.softcap = static_cast<float>(m.numbers.attention_softcap);

  const int64_t sizes[] = {s.tokens() * s.hidden,        s.tokens() * s.hidden,
                           s.tokens() * s.projected(),   s.tokens() * s.heads * s.chunks * s.partial(),
                           s.tokens() * s.intermediate,  s.tokens() * s.intermediate,
                           s.tokens() * (s.experts + 1), s.threads * s.own_size(),
                           s.threads * s.ready_size()};
  const auto floats = m.norm.options().dtype(at::kFloat);
  const Tensor logits = empty({s.batch, s.kept, s.vocabulary}, floats);
  const Tensor memory = empty({std::accumulate(std::begin(sizes), std::end(sizes), int64_t{0})}, floats);
  float* next = elements<float>(memory);
  float** const places[] = {&s.states, &s.output, &s.qkv, &s.partials, &s.gates, &s.ups, &s.routes, &s.own, &s.ready};
  for (size_t i = 0; i < std::size(places); ++i) {
    *places[i] = next;
    next += sizes[i];
  }
  s.logits = elements<float>(logits);
  run_team(s.threads, [&s](const Team& team) { run_step(s, team); });
  finish_logits(m, logits);
  return logits;
}

}  // namespace torch_fused
