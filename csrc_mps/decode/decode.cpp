// A step of a whole decoder: schema, checks, autograd, and the choice of the next token.
#include "decode.h"

#include <torch/library.h>

#include <algorithm>
#include <string>
#include <utility>

#include "../common/autograd.h"
#include "../common/checks.h"
#include "../common/lazy_views.h"
#include "../common/memory.h"
#include "../common/registration.h"
#include "../common/rows.h"
#include "../common/torch_functions.h"
#include "../sampling/sampling.h"

namespace torch_fused {

using at::Tensor;
using at::TensorList;

// ---- checks of a call -----------------------------------------------------------------------------------------------

namespace {

void check_indices(const char* name, const Tensor& tensor, at::IntArrayRef shape, int64_t end, c10::Device device) {
  TORCH_CHECK(tensor.scalar_type() == at::kLong && tensor.device() == device && tensor.sizes() == shape &&
                  tensor.is_contiguous(),
              "decode_: ", name, " must be a contiguous int64 tensor of shape ", shape, " on ", device, ", got ",
              tensor.scalar_type(), " ", tensor.sizes(), " on ", tensor.device());
  if (!tensor.is_cpu()) return;
  const int64_t* values = elements<const int64_t>(tensor);
  for (int64_t i = 0; i < tensor.numel(); ++i) {
    TORCH_CHECK_INDEX(values[i] >= 0 && values[i] < end, "decode_: ", name, " must be from 0 to ", end - 1, ", got ",
                      values[i]);
  }
}

void check_cache(const char* name, TensorList buffers, const DecodeCall& call) {
  const Decoder& m = call.model;
  TORCH_CHECK(buffers.size() == m.layers.size(), "decode_: ", name, " must be a tensor for each of the ",
              m.layers.size(), " layers, got ", buffers.size());
  for (size_t i = 0; i < buffers.size(); ++i) {
    const Tensor& buffer = buffers[i];
    TORCH_CHECK(buffer.dim() == 4 && buffer.size(0) == call.batch && buffer.size(1) == m.kv_heads &&
                    buffer.size(3) == m.head_dim && (buffer.stride(3) == 1 || m.head_dim == 1),
                "decode_: ", name, " must be (", call.batch, ", ", m.kv_heads, ", capacity, ", m.head_dim,
                ") with a dense last dimension, got shape ", buffer.sizes(), " with strides ", buffer.strides());
    const at::ScalarType dtype = buffer.scalar_type();
    TORCH_CHECK(
        dtype == call.keys[0].scalar_type() && (dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16),
        "decode_: ", name, " must all be float32, all float16 or all bfloat16, got ", dtype);
    TORCH_CHECK(buffer.device() == m.norm.device(), "decode_: ", name, " must be on the model's device ",
                m.norm.device(), ", got ", buffer.device());
    TORCH_CHECK(call.length - call.dropped_of(i) <= buffer.size(2) - call.steps, "decode_: ", name,
                " must have room for ", call.steps, " tokens after length = ", call.length, ", got a capacity of ",
                buffer.size(2), call.dropped_of(i) > 0 ? " after those that were dropped" : "");
  }
}

void check_dropped(const DecodeCall& call) {
  const std::vector<DecoderLayer>& layers = call.model.layers;
  TORCH_CHECK(call.dropped.empty() || call.dropped.size() == layers.size(),
              "decode_: dropped must be empty or a number for each of the ", layers.size(), " layers, got ",
              call.dropped.size());
  for (size_t i = 0; i < call.dropped.size(); ++i) {
    const int64_t dropped = call.dropped[i], window = layers[i].window;
    TORCH_CHECK(dropped == 0 || (window > 0 && dropped > 0 && dropped <= call.length - (window - 1)),
                "decode_: dropped of layer ", i, " must be 0, or at most what its window of ", window,
                " leaves out of length = ", call.length, ", got ", dropped);
  }
}

// The caches are written: nothing else may be there.
void check_memory(const DecodeCall& call) {
  const Decoder& model = call.model;
  MemoryCheck memory("decode_");
  bool near_the_model = false;
  for (size_t i = 0; i < call.keys.size(); ++i) {
    memory.writes("keys", call.keys[i], static_cast<int64_t>(i));
    memory.writes("values", call.values[i], static_cast<int64_t>(i));
    near_the_model = near_the_model || model.memory.meets(call.keys[i]) || model.memory.meets(call.values[i]);
  }
  memory.reads("token_ids", call.token_ids);
  memory.reads("positions", call.positions);
  if (call.starts) memory.reads("starts", *call.starts);
  memory.reads("cos", call.cos);
  memory.reads("sin", call.sin);
  if (near_the_model) {
    for (const Decoder::Taken& part : model.taken) memory.reads(part.name.c_str(), part.tensor);
  }
  memory.run();
}

}  // namespace

DecodeCall check_decode(const DecoderPtr& model, const Tensor& token_ids, const Tensor& positions,
                        const OptionalTensor& starts, const Tensor& cos, const Tensor& sin, TensorList keys,
                        TensorList values, int64_t length, int64_t logits_to_keep, at::IntArrayRef dropped) {
  const Decoder& m = *model;
  const Decoder::Taken* changed = m.changed();
  TORCH_CHECK(!changed, "decode_: ", changed->name,
              " of the model has been given other memory or another shape: make the decoder again");
  const c10::Device device = m.norm.device();
  TORCH_CHECK(token_ids.dim() == 2 && token_ids.size(0) >= 1 && token_ids.size(0) <= kMostBatch &&
                  token_ids.size(1) >= 1 && token_ids.size(1) <= kMostSteps,
              "decode_: token_ids must be (batch, steps) with 1 to ", kMostBatch, " sequences and 1 to ", kMostSteps,
              " tokens of each, got shape ", token_ids.sizes());
  DecodeCall call{m,
                  token_ids,
                  positions,
                  starts,
                  cos,
                  sin,
                  keys,
                  values,
                  token_ids.size(0),
                  token_ids.size(1),
                  length,
                  logits_to_keep == 0 ? token_ids.size(1) : logits_to_keep,
                  0,
                  dropped};
  for (const auto& [name, table] : {std::pair<const char*, const Tensor&>{"cos", cos}, {"sin", sin}}) {
    TORCH_CHECK((table.dim() == 2 || table.dim() == 3) && table.is_contiguous() && table.size(-1) % 2 == 0 &&
                    table.size(-1) <= m.head_dim && table.sizes() == cos.sizes(),
                "decode_: ", name,
                " must be a contiguous (positions, rotary dim), or a stack of such tables, with an even rotary dim of "
                "at most ",
                m.head_dim, ", got shape ", table.sizes());
    const int64_t count = table.dim() == 2 ? 1 : table.size(0);
    for (const DecoderLayer& layer : m.layers) {
      TORCH_CHECK(layer.table < count, "decode_: ", name, " must have the model's table ", layer.table, ", got ",
                  count);
    }
    check_dtype("decode_", name, table);
    TORCH_CHECK(
        table.scalar_type() == cos.scalar_type() && table.scalar_type() != at::kDouble && table.device() == device,
        "decode_: ", name, " must have cos's dtype, ", cos.scalar_type(), ", not float64, and be on ", device, ", got ",
        table.scalar_type(), " on ", table.device());
  }
  call.rotary_dim = cos.size(-1);
  TORCH_CHECK(length >= 0, "decode_: length must not be negative, got ", length);
  TORCH_CHECK(logits_to_keep >= 0 && logits_to_keep <= call.steps, "decode_: logits_to_keep must be from 0 to ",
              call.steps, ", got ", logits_to_keep);
  check_dropped(call);
  check_cache("keys", keys, call);
  check_cache("values", values, call);
  check_indices("token_ids", token_ids, token_ids.sizes(), m.embedding.rows(), device);
  check_indices("positions", positions, token_ids.sizes(), cos.size(-2), device);
  if (starts) check_indices("starts", *starts, {call.batch}, length + 1, device);
  check_memory(call);
  return call;
}

void finish_logits(const Decoder& model, const Tensor& logits) {
  const DecoderNumbers& n = model.numbers;
  Tensor result = logits;
  if (n.logits_scale != 1) result.mul_(n.logits_scale);
  if (n.logits_softcap > 0) result.div_(n.logits_softcap).tanh_().mul_(n.logits_softcap);
}

// ---- autograd -------------------------------------------------------------------------------------------------------

namespace {

// Not differentiable, but autograd must know that the cache has changed.
Tensor decode_autograd(const DecoderPtr& model, const Tensor& token_ids, const Tensor& positions,
                       const OptionalTensor& starts, const Tensor& cos, const Tensor& sin, TensorList keys,
                       TensorList values, int64_t length, int64_t logits_to_keep, at::IntArrayRef dropped) {
  if (may_differentiate()) {  // there are hundreds of tensors to ask
    for (const Decoder::Taken& part : model->taken) {
      check_not_differentiated("decode_", part.name.c_str(), part.original);
    }
    check_not_differentiated("decode_", "cos", cos);
    check_not_differentiated("decode_", "sin", sin);
    for (const auto& [name, buffers] : {std::pair("keys", keys), std::pair("values", values)}) {
      for (const Tensor& buffer : buffers) check_not_differentiated("decode_", name, buffer);
    }
  }
  static const auto op = find_op<decltype(decode_cpu)>("torch_fused::decode_");
  return change({keys, values}, [&] {
    return op.call(model, token_ids, positions, starts, cos, sin, keys, values, length, logits_to_keep, dropped);
  });
}

// ---- with the choice of the next token ------------------------------------------------------------------------------

Tensor decode_token(const DecoderPtr& model, const Tensor& token_ids, const Tensor& positions,
                    const OptionalTensor& starts, const Tensor& cos, const Tensor& sin, TensorList keys,
                    TensorList values, int64_t length, bool do_sample, double temperature, std::optional<int64_t> top_k,
                    std::optional<double> top_p, std::optional<double> min_p, at::IntArrayRef dropped) {
  if (do_sample) check_filters("decode_token_", temperature, top_k, top_p, min_p);  // before the cache is written
  // What could not be drawn from must not be appended to the cache.
  TORCH_CHECK(model->vocabulary <= kMostTokens, "decode_token_: head must have 1 to ", kMostTokens,
              " rows to choose from, got ", model->vocabulary);
  if (do_sample) {
    const Tensor row = empty({1}, cos.options().dtype(at::kFloat)).expand({1, model->vocabulary});
    check_sampling("decode_token_", row, temperature, top_k, top_p, min_p, std::nullopt);
  }
  static const auto decode = find_op<decltype(decode_cpu)>("torch_fused::decode_");
  const Tensor logits =
      decode.call(model, token_ids, positions, starts, cos, sin, keys, values, length, 1, dropped).squeeze(1);
  static const auto next_token =
      find_op<Tensor(const Tensor&, bool, double, std::optional<int64_t>, std::optional<double>,
                     std::optional<double>)>("torch_fused::_next_token");
  return next_token.call(logits, do_sample, temperature, top_k, top_p, min_p);
}

}  // namespace
}  // namespace torch_fused

TORCH_LIBRARY_FRAGMENT(torch_fused, m) {
  using namespace torch_fused;
  m.class_<Decoder>("Decoder")
      .def(torch::init<const Tensor&, const std::vector<OptionalTensor>&, const Tensor&, const Tensor&,
                       const std::vector<Tensor>&, int64_t, const std::vector<double>&, const std::string&,
                       const std::vector<int64_t>&, const std::vector<int64_t>&, bool, const std::vector<Tensor>&,
                       const std::vector<int64_t>&, const std::vector<double>&>())
      .def("arguments", [](const DecoderPtr& model) { return model->arguments(); })
      .def("is_current", [](const DecoderPtr& model) { return !model->changed(); })
      // What torch.compile traces in its place; ops/decoder.py has the class.
      .def("__obj_flatten__", [](const DecoderPtr& model) {
        const auto [embedding, layers, norm, head, groups, heads, numbers, activation, windows, tables, int8_products,
                    adapters, adapter_places, adapter_scales] = model->arguments();
        const auto named = [](const char* name, const auto& value) {
          return std::make_tuple(std::string(name), value);
        };
        return std::make_tuple(named("embedding", embedding), named("layers", layers), named("norm", norm),
                               named("head", head), named("groups", groups), named("heads", heads),
                               named("numbers", numbers), named("activation", activation), named("windows", windows),
                               named("tables", tables), named("int8_products", int8_products),
                               named("adapters", adapters), named("adapter_places", adapter_places),
                               named("adapter_scales", adapter_scales));
      });
  m.def(
      "decode_(__torch__.torch.classes.torch_fused.Decoder model, Tensor token_ids, Tensor positions, Tensor? starts, "
      "Tensor cos, Tensor sin, Tensor(a!)[] keys, Tensor(b!)[] values, int length, int logits_to_keep, int[] "
      "dropped=[]) -> Tensor");
  m.def(
      "decode_token_(__torch__.torch.classes.torch_fused.Decoder model, Tensor token_ids, Tensor positions, "
      "Tensor? starts, Tensor cos, Tensor sin, Tensor(a!)[] keys, Tensor(b!)[] values, int length, bool do_sample, "
      "float temperature, int? top_k, float? top_p, float? min_p, int[] dropped=[]) -> Tensor",
      {at::Tag::nondeterministic_seeded});
}
TORCH_LIBRARY_IMPL(torch_fused, CompositeImplicitAutograd, m) {
  m.impl("decode_token_", torch_fused::decode_token);
}
TORCH_LIBRARY_IMPL(torch_fused, Autograd, m) {
  m.impl("decode_", torch_fused::decode_autograd);
}
TORCH_FUSED_WRITES(decode_)
TORCH_FUSED_KERNELS_NAMED(decode_, decode)
