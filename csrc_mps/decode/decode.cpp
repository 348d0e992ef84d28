// A step of a whole decoder as one op on the CPU: schema, checks, memory and threads.

#include "decode.h"

#include <ATen/Dispatch.h>
#include <ATen/Version.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <numeric>
#include <optional>
#include <string>
#include <utility>

#include "../common/autograd.h"
#include "../common/checks.h"
#include "../common/lazy_views.h"
#include "../common/memory.h"
#include "../common/rows.h"
#include "../sampling/sampling.h"
#include "team.h"

TORCH_LIBRARY_FRAGMENT(torch_fused, m) {
  m.def(
      "decode_(Tensor token_ids, Tensor positions, Tensor? starts, Tensor embedding, Tensor cos, Tensor sin, "
      "Tensor?[] layers, Tensor norm, Tensor head, Tensor(a!)[] keys, Tensor(b!)[] values, int length, int heads, "
      "float eps, float scaling, int logits_to_keep) -> Tensor");
  m.def(
      "decode_token_(Tensor token_ids, Tensor positions, Tensor? starts, Tensor embedding, Tensor cos, Tensor sin, "
      "Tensor?[] layers, Tensor norm, Tensor head, Tensor(a!)[] keys, Tensor(b!)[] values, int length, int heads, "
      "float eps, float scaling, bool do_sample, float temperature, int? top_k, float? top_p, float? min_p) -> Tensor",
      {at::Tag::nondeterministic_seeded});
}

namespace torch_fused {
namespace {

using at::Tensor;
using at::TensorList;
using OptionalTensor = std::optional<Tensor>;
using OptionalTensors = c10::List<std::optional<Tensor>>;

// What a layer has in the flat list of all layers, in this order. ops/decode.py has the same names.
enum LayerPart {
  kInputNorm,
  kQ,
  kQBias,
  kK,
  kKBias,
  kV,
  kVBias,
  kQNorm,
  kKNorm,
  kO,
  kOBias,
  kPostAttentionNorm,
  kGate,
  kUp,
  kDown,
  kLayerParts
};
constexpr const char* kPartNames[] = {"input norm", "q",      "q bias", "k", "k bias", "v",
                                      "v bias",     "q norm", "k norm", "o", "o bias", "post-attention norm",
                                      "gate",       "up",     "down"};

constexpr int64_t kChunk = 64;  // slots that a chunk of the context should at least have

// The arguments of one call.
struct Call {
  const Tensor &token_ids, &positions;
  const OptionalTensor& starts;
  const Tensor &embedding, &cos, &sin;
  const OptionalTensors& layers;
  const Tensor &norm, &head;
  TensorList keys, values;
  int64_t length, heads;
  double eps, scaling;
  int64_t logits_to_keep;
};

// ---- checks ---------------------------------------------------------------------------------------------------------

// What check_weight demands, without a name to be made for each of the hundreds of tensors of a call.
bool is_weight(const Tensor& tensor, at::IntArrayRef shape, const Tensor& embedding) {
  return tensor.sizes() == shape && tensor.scalar_type() == embedding.scalar_type() &&
         tensor.device() == embedding.device() && (tensor.stride(-1) == 1 || tensor.size(-1) == 1);
}

// `tensor` must have the shape, one the embedding's dtype and device, and dense rows.
void check_weight(const std::string& name, const Tensor& tensor, at::IntArrayRef shape, const Tensor& embedding) {
  TORCH_CHECK(tensor.sizes() == shape, "decode_: ", name, " must have shape ", shape, ", got ", tensor.sizes());
  check_alike("decode_", name.c_str(), tensor, "embedding", embedding);
  TORCH_CHECK(tensor.stride(-1) == 1 || tensor.size(-1) == 1, "decode_: ", name, " must have dense rows, got strides ",
              tensor.strides());
}

void check_indices(const char* name, const Tensor& tensor, at::IntArrayRef shape, int64_t end) {
  TORCH_CHECK(tensor.scalar_type() == at::kLong && tensor.is_cpu() && tensor.sizes() == shape && tensor.is_contiguous(),
              "decode_: ", name, " must be a contiguous int64 tensor of shape ", shape, " on the CPU, got ",
              tensor.scalar_type(), " ", tensor.sizes(), " on ", tensor.device());
  const int64_t* values = elements<const int64_t>(tensor);
  for (int64_t i = 0; i < tensor.numel(); ++i) {
    TORCH_CHECK_INDEX(values[i] >= 0 && values[i] < end, "decode_: ", name, " must be from 0 to ", end - 1, ", got ",
                      values[i]);
  }
}

void check_cache(const char* name, TensorList buffers, const StepShape& s, int64_t layers, const Tensor& embedding) {
  TORCH_CHECK(static_cast<int64_t>(buffers.size()) == layers, "decode_: ", name, " must be a tensor for each of the ",
              layers, " layers, got ", buffers.size());
  for (const Tensor& buffer : buffers) {
    TORCH_CHECK(buffer.dim() == 4 && buffer.size(0) == s.batch && buffer.size(1) == s.kv_heads &&
                    buffer.size(3) == s.head_dim && (buffer.stride(3) == 1 || s.head_dim == 1),
                "decode_: ", name, " must be (", s.batch, ", ", s.kv_heads, ", capacity, ", s.head_dim,
                ") with a dense last dimension, got shape ", buffer.sizes(), " with strides ", buffer.strides());
    check_alike("decode_", name, buffer, "embedding", embedding);
    TORCH_CHECK(s.length <= buffer.size(2) - s.steps, "decode_: ", name, " must have room for ", s.steps,
                " tokens after length = ", s.length, ", got a capacity of ", buffer.size(2));
  }
}

// The caches are written: nothing else may be there.
void check_memory(const Call& call) {
  MemoryCheck memory("decode_");
  for (size_t i = 0; i < call.keys.size(); ++i) {
    memory.writes("keys", call.keys[i], static_cast<int64_t>(i));
    memory.writes("values", call.values[i], static_cast<int64_t>(i));
  }
  memory.reads("token_ids", call.token_ids);
  memory.reads("positions", call.positions);
  if (call.starts) memory.reads("starts", *call.starts);
  memory.reads("embedding", call.embedding);
  memory.reads("cos", call.cos);
  memory.reads("sin", call.sin);
  for (size_t i = 0; i < call.layers.size(); ++i) {
    if (const OptionalTensor part = call.layers.get(i)) memory.reads("layers", *part, static_cast<int64_t>(i));
  }
  memory.reads("norm", call.norm);
  memory.reads("head", call.head);
  memory.run();
}

OptionalTensor layer_part(const Call& call, int64_t layer, LayerPart part) {
  return call.layers.get(layer * kLayerParts + part);
}

void check_part(const Call& call, int64_t layer, LayerPart part, at::IntArrayRef shape, bool may_be_absent) {
  const OptionalTensor tensor = layer_part(call, layer, part);
  if (tensor ? is_weight(*tensor, shape, call.embedding) : may_be_absent) return;
  const std::string name = std::string(kPartNames[part]) + " of layer " + std::to_string(layer);
  TORCH_CHECK(tensor, "decode_: ", name, " must be a tensor, got None");
  check_weight(name, *tensor, shape, call.embedding);
}

StepShape check(const Call& call) {
  StepShape s{};
  TORCH_CHECK(call.token_ids.dim() == 2 && call.token_ids.size(0) >= 1 && call.token_ids.size(0) <= kMostBatch &&
                  call.token_ids.size(1) >= 1 && call.token_ids.size(1) <= kMostSteps,
              "decode_: token_ids must be (batch, steps) with 1 to ", kMostBatch, " sequences and 1 to ", kMostSteps,
              " tokens of each, got shape ", call.token_ids.sizes());
  s.batch = call.token_ids.size(0);
  s.steps = call.token_ids.size(1);
  const at::ScalarType dtype = call.embedding.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16,
              "decode_: embedding must be float32, float16 or bfloat16, got ", dtype);
  TORCH_CHECK(call.embedding.dim() == 2 && call.embedding.numel() > 0 && call.embedding.is_cpu(),
              "decode_: embedding must be (vocabulary, hidden) on the CPU, got shape ", call.embedding.sizes(), " on ",
              call.embedding.device());
  s.hidden = call.embedding.size(1);
  check_weight("embedding", call.embedding, call.embedding.sizes(), call.embedding);
  TORCH_CHECK(call.head.dim() == 2, "decode_: head must be (vocabulary, hidden), got shape ", call.head.sizes());
  s.vocabulary = call.head.size(0);
  check_weight("head", call.head, {s.vocabulary, s.hidden}, call.embedding);
  check_weight("norm", call.norm, {s.hidden}, call.embedding);

  const int64_t layers = static_cast<int64_t>(call.layers.size()) / kLayerParts;
  TORCH_CHECK(layers >= 1 && layers * kLayerParts == static_cast<int64_t>(call.layers.size()),
              "decode_: layers must have ", int64_t{kLayerParts}, " entries for each layer, got ", call.layers.size());
  const OptionalTensor q = layer_part(call, 0, kQ), k = layer_part(call, 0, kK), gate = layer_part(call, 0, kGate);
  TORCH_CHECK(q && k && gate && q->dim() == 2 && k->dim() == 2 && gate->dim() == 2,
              "decode_: q, k and gate of layer 0 must be matrices");
  s.heads = call.heads;
  TORCH_CHECK(s.heads >= 1 && q->size(0) >= s.heads && q->size(0) % s.heads == 0,
              "decode_: heads must divide the rows of q, ", q->size(0), ", got ", s.heads);
  s.head_dim = q->size(0) / s.heads;
  s.kv_heads = k->size(0) / s.head_dim;
  TORCH_CHECK(s.kv_heads >= 1 && s.kv_heads * s.head_dim == k->size(0) && s.heads % s.kv_heads == 0,
              "decode_: k of layer 0 must have rows for a number of heads of ", s.head_dim, " that divides ", s.heads,
              ", got ", k->size(0));
  s.intermediate = gate->size(0);
  const int64_t q_rows = s.heads * s.head_dim, kv_rows = s.kv_heads * s.head_dim;
  for (int64_t layer = 0; layer < layers; ++layer) {
    check_part(call, layer, kInputNorm, {s.hidden}, false);
    check_part(call, layer, kQ, {q_rows, s.hidden}, false);
    check_part(call, layer, kQBias, {q_rows}, true);
    check_part(call, layer, kK, {kv_rows, s.hidden}, false);
    check_part(call, layer, kKBias, {kv_rows}, true);
    check_part(call, layer, kV, {kv_rows, s.hidden}, false);
    check_part(call, layer, kVBias, {kv_rows}, true);
    check_part(call, layer, kQNorm, {s.head_dim}, true);
    check_part(call, layer, kKNorm, {s.head_dim}, true);
    check_part(call, layer, kO, {s.hidden, q_rows}, false);
    check_part(call, layer, kOBias, {s.hidden}, true);
    check_part(call, layer, kPostAttentionNorm, {s.hidden}, false);
    check_part(call, layer, kGate, {s.intermediate, s.hidden}, false);
    check_part(call, layer, kUp, {s.intermediate, s.hidden}, false);
    check_part(call, layer, kDown, {s.hidden, s.intermediate}, false);
  }

  TORCH_CHECK(
      call.cos.dim() == 2 && call.cos.is_contiguous() && call.cos.size(1) % 2 == 0 && call.cos.size(1) <= s.head_dim,
      "decode_: cos must be a contiguous (positions, rotary dim) with an even rotary dim of at most ", s.head_dim,
      ", got shape ", call.cos.sizes());
  s.rotary_dim = call.cos.size(1);
  check_weight("cos", call.cos, call.cos.sizes(), call.embedding);
  check_weight("sin", call.sin, call.cos.sizes(), call.embedding);
  TORCH_CHECK(call.sin.is_contiguous(), "decode_: sin must be contiguous, got strides ", call.sin.strides());
  check_indices("token_ids", call.token_ids, call.token_ids.sizes(), call.embedding.size(0));
  check_indices("positions", call.positions, call.token_ids.sizes(), call.cos.size(0));
  TORCH_CHECK(call.length >= 0, "decode_: length must not be negative, got ", call.length);
  s.length = call.length;
  check_cache("keys", call.keys, s, layers, call.embedding);
  check_cache("values", call.values, s, layers, call.embedding);
  if (call.starts) check_indices("starts", *call.starts, {s.batch}, s.length + 1);
  TORCH_CHECK(call.logits_to_keep >= 0 && call.logits_to_keep <= s.steps, "decode_: logits_to_keep must be from 0 to ",
              s.steps, ", got ", call.logits_to_keep);
  s.kept = call.logits_to_keep == 0 ? s.steps : call.logits_to_keep;
  check_memory(call);
  return s;
}

// ---- CPU ------------------------------------------------------------------------------------------------------------

template <class T>
const T* vector_of(const OptionalTensor& tensor) {
  return tensor ? elements<const T>(*tensor) : nullptr;
}

template <class T>
Matrix<T> matrix_of(const Tensor& weight, const OptionalTensor& bias = std::nullopt) {
  return {elements<const T>(weight), weight.size(0), weight.size(1), weight.stride(0), vector_of<T>(bias)};
}

template <class T>
CacheStates<T> states_of(const Tensor& buffer) {
  return {elements<T>(buffer), buffer.stride(0), buffer.stride(1), buffer.stride(2)};
}

template <class T>
Layer<T> layer_of(const Call& call, int64_t index) {
  const auto part = [&](LayerPart name) { return layer_part(call, index, name); };
  return {vector_of<T>(part(kInputNorm)),
          matrix_of<T>(*part(kQ), part(kQBias)),
          matrix_of<T>(*part(kK), part(kKBias)),
          matrix_of<T>(*part(kV), part(kVBias)),
          matrix_of<T>(*part(kO), part(kOBias)),
          vector_of<T>(part(kQNorm)),
          vector_of<T>(part(kKNorm)),
          vector_of<T>(part(kPostAttentionNorm)),
          matrix_of<T>(*part(kGate)),
          matrix_of<T>(*part(kUp)),
          matrix_of<T>(*part(kDown)),
          states_of<T>(call.keys[index]),
          states_of<T>(call.values[index])};
}

// So many chunks that all threads have as much to do, if the context is long enough to be worth it.
int64_t count_chunks(const StepShape& s) {
  const int64_t heads = s.batch * s.kv_heads, even = s.threads / std::gcd(heads, s.threads);
  const int64_t wanted = (4 * s.threads + heads - 1) / heads, most = s.length / kChunk;
  const int64_t chunks = std::min((wanted + even - 1) / even * even, most);
  return chunks >= even ? chunks / even * even : std::max<int64_t>(1, chunks);
}

// With the best instructions that the machine has, or that ATEN_CPU_CAPABILITY allows torch.
template <class T>
void run_step(const Step<T>& step, const Team& team) {
#ifdef TORCH_FUSED_X86_DISPATCH
  static const std::string allowed = at::get_cpu_capability();
  if (allowed == "AVX512" && __builtin_cpu_supports("x86-64-v4")) return avx512::run_step(step, team);
  if (allowed != "DEFAULT" && __builtin_cpu_supports("x86-64-v3")) return avx2::run_step(step, team);
#endif
  baseline::run_step(step, team);
}

template <class T>
void run(const Call& call, const StepShape& shape, const Tensor& logits) {
  Step<T> s{};
  static_cast<StepShape&>(s) = shape;
  s.token_ids = elements<const int64_t>(call.token_ids);
  s.positions = elements<const int64_t>(call.positions);
  s.starts = call.starts ? elements<const int64_t>(*call.starts) : nullptr;
  s.embedding = elements<const T>(call.embedding);
  s.embedding_stride = call.embedding.stride(0);
  s.cos = elements<const T>(call.cos);
  s.sin = elements<const T>(call.sin);
  for (size_t i = 0; i < call.keys.size(); ++i) s.layers.push_back(layer_of<T>(call, static_cast<int64_t>(i)));
  s.norm = elements<const T>(call.norm);
  s.head = matrix_of<T>(call.head);
  s.eps = static_cast<float>(call.eps);
  s.scaling = static_cast<float>(call.scaling);

  const int64_t sizes[] = {
      s.tokens() * s.hidden,       s.tokens() * s.projected(),  s.tokens() * s.heads * s.chunks * s.partial(),
      s.tokens() * s.intermediate, s.tokens() * s.intermediate, s.threads * s.own_size()};
  int64_t total = 0;
  for (const int64_t size : sizes) total += size;
  const Tensor memory = at::empty({total}, logits.options());
  float* next = elements<float>(memory);
  float** const places[] = {&s.states, &s.qkv, &s.partials, &s.gates, &s.ups, &s.own};
  for (size_t i = 0; i < std::size(places); ++i) {
    *places[i] = next;
    next += sizes[i];
  }
  s.logits = elements<float>(logits);
  run_team(s.threads, [&s](const Team& team) { run_step(s, team); });
}

Tensor decode_cpu(const Tensor& token_ids, const Tensor& positions, const OptionalTensor& starts,
                  const Tensor& embedding, const Tensor& cos, const Tensor& sin, const OptionalTensors& layers,
                  const Tensor& norm, const Tensor& head, TensorList keys, TensorList values, int64_t length,
                  int64_t heads, double eps, double scaling, int64_t logits_to_keep) {
  const Call call{token_ids, positions, starts, embedding, cos,   sin, layers,  norm,
                  head,      keys,      values, length,    heads, eps, scaling, logits_to_keep};
  StepShape shape = check(call);
  shape.threads = team_size();
  shape.chunks = count_chunks(shape);
  const Tensor logits = at::empty({shape.batch, shape.kept, shape.vocabulary}, embedding.options().dtype(at::kFloat));
  AT_DISPATCH_SWITCH(embedding.scalar_type(), "decode_",
                     AT_DISPATCH_CASE(at::kFloat, [&] { run<scalar_t>(call, shape, logits); })
                         AT_DISPATCH_CASE(at::kHalf, [&] { run<scalar_t>(call, shape, logits); })
                             AT_DISPATCH_CASE(at::kBFloat16, [&] { run<scalar_t>(call, shape, logits); }));
  return logits;
}

// ---- autograd -------------------------------------------------------------------------------------------------------

// Not differentiable, but autograd must know that the cache has changed.
Tensor decode_autograd(const Tensor& token_ids, const Tensor& positions, const OptionalTensor& starts,
                       const Tensor& embedding, const Tensor& cos, const Tensor& sin, const OptionalTensors& layers,
                       const Tensor& norm, const Tensor& head, TensorList keys, TensorList values, int64_t length,
                       int64_t heads, double eps, double scaling, int64_t logits_to_keep) {
  const std::pair<const char*, const Tensor*> weights[] = {
      {"embedding", &embedding}, {"cos", &cos}, {"sin", &sin}, {"norm", &norm}, {"head", &head}};
  for (const auto& [name, tensor] : weights) check_not_differentiated("decode_", name, *tensor);
  for (const OptionalTensor& tensor : layers) {
    if (tensor) check_not_differentiated("decode_", "layers", *tensor);
  }
  for (const auto& [name, buffers] : {std::pair("keys", keys), std::pair("values", values)}) {
    for (const Tensor& buffer : buffers) check_not_differentiated("decode_", name, buffer);
  }
  static const auto op = find_op<decltype(decode_cpu)>("torch_fused::decode_");
  return change({keys, values}, [&] {
    return op.call(token_ids, positions, starts, embedding, cos, sin, layers, norm, head, keys, values, length, heads,
                   eps, scaling, logits_to_keep);
  });
}

// ---- with the choice of the next token ------------------------------------------------------------------------------

Tensor decode_token(const Tensor& token_ids, const Tensor& positions, const OptionalTensor& starts,
                    const Tensor& embedding, const Tensor& cos, const Tensor& sin, const OptionalTensors& layers,
                    const Tensor& norm, const Tensor& head, TensorList keys, TensorList values, int64_t length,
                    int64_t heads, double eps, double scaling, bool do_sample, double temperature,
                    std::optional<int64_t> top_k, std::optional<double> top_p, std::optional<double> min_p) {
  if (do_sample) check_filters("decode_token_", temperature, top_k, top_p, min_p);  // before the cache is written
  static const auto decode = find_op<decltype(decode_cpu)>("torch_fused::decode_");
  if (head.dim() == 2) {  // what could not be drawn from must not be appended to the cache
    TORCH_CHECK(head.size(0) >= 1 && head.size(0) <= kMostTokens, "decode_token_: head must have 1 to ", kMostTokens,
                " rows to choose from, got ", head.size(0));
    const Tensor row = at::empty({1}, head.options().dtype(at::kFloat)).expand({1, head.size(0)});
    if (do_sample) check_sampling("decode_token_", row, temperature, top_k, top_p, min_p, std::nullopt);
  }
  const Tensor logits = decode
                            .call(token_ids, positions, starts, embedding, cos, sin, layers, norm, head, keys, values,
                                  length, heads, eps, scaling, 1)
                            .squeeze(1);
  static const auto next_token =
      find_op<Tensor(const Tensor&, bool, double, std::optional<int64_t>, std::optional<double>,
                     std::optional<double>)>("torch_fused::_next_token");
  return next_token.call(logits, do_sample, temperature, top_k, top_p, min_p);
}

}  // namespace
}  // namespace torch_fused

TORCH_LIBRARY_IMPL(torch_fused, CompositeImplicitAutograd, m) {
  m.impl("decode_token_", torch_fused::decode_token);
}
TORCH_LIBRARY_IMPL(torch_fused, CPU, m) {
  m.impl("decode_", torch_fused::decode_cpu);
}
TORCH_LIBRARY_IMPL(torch_fused, Autograd, m) {
  m.impl("decode_", torch_fused::decode_autograd);
}
TORCH_FUSED_WRITES(decode_)
