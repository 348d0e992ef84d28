// A step of a whole decoder: the model as an object, schema, checks, and the step on the CPU.
#include "decode.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <map>
#include <numeric>
#include <string>
#include <utility>

#include "../common/autograd.h"
#include "../common/checks.h"
#include "../common/lazy_views.h"
#include "../common/memory.h"
#include "../common/rows.h"
#include "../sampling/sampling.h"
#include "cpu_step.h"

namespace torch_fused {

using at::Tensor;
using at::TensorList;

// ---- the model ------------------------------------------------------------------------------------------------------

namespace {

constexpr size_t kLayerParts = 22;  // ops/decode.py has their names

constexpr const char* kActivations[] = {"silu", "gelu", "gelu_tanh"};  // in the order of decode_params.h

uint32_t activation_of(const std::string& name) {
  const auto found = std::find(std::begin(kActivations), std::end(kActivations), name);
  TORCH_CHECK(found != std::end(kActivations), "Decoder: activation must be silu, gelu or gelu_tanh, got ", name);
  return static_cast<uint32_t>(found - std::begin(kActivations));
}

constexpr const char* kNumbers[] = {
    "eps",          "scaling",           "norm_offset",    "embedding_scale",   "residual_scale",
    "logits_scale", "attention_softcap", "logits_softcap", "experts_per_token", "normalise_experts"};

DecoderNumbers numbers_of(const std::vector<double>& n) {
  TORCH_CHECK(n.size() == std::size(kNumbers), "Decoder: numbers must be ", std::size(kNumbers), ", got ", n.size());
  for (size_t i = 0; i < n.size(); ++i) {
    TORCH_CHECK(std::isfinite(n[i]), "Decoder: ", kNumbers[i], " must be finite, got ", n[i]);
  }
  const DecoderNumbers numbers{n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9]};
  constexpr double kLeastCap = 1e-6;  // float32 has no ratios to smaller ones
  for (const double cap : {numbers.attention_softcap, numbers.logits_softcap}) {
    TORCH_CHECK(cap == 0 || cap >= kLeastCap, "Decoder: attention_softcap and logits_softcap must be 0 or at least ",
                kLeastCap, ", got ", cap);
  }
  TORCH_CHECK(numbers.experts_per_token >= 0 && numbers.experts_per_token <= kMostChosen,
              "Decoder: experts_per_token must be from 0 to ", kMostChosen, ", got ", numbers.experts_per_token);
  return numbers;
}

}  // namespace

// Checks the tensors of a model one by one, and takes each as it is now.
class Decoder::Reader {
 public:
  Reader(const Tensor& embedding, const std::vector<Tensor>& groups) : device_(embedding.device()), groups_(groups) {}

  Tensor take(const Tensor& tensor, const std::string& name, at::IntArrayRef shape, bool codes = false) {
    TORCH_CHECK(tensor.sizes() == shape, "Decoder: ", name, " must have shape ", shape, ", got ", tensor.sizes());
    const at::ScalarType dtype = tensor.scalar_type();
    TORCH_CHECK(codes || dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, "Decoder: ", name,
                " must be float32, float16 or bfloat16, got ", dtype);
    TORCH_CHECK(tensor.device() == device_, "Decoder: ", name, " must be on the embedding's device ", device_, ", got ",
                tensor.device());
    TORCH_CHECK(tensor.layout() == at::kStrided && (tensor.stride(-1) == 1 || tensor.size(-1) == 1), "Decoder: ", name,
                " must have dense rows, got strides ", tensor.strides());
    TORCH_CHECK(!tensor.is_neg(), "Decoder: ", name, " must not be a lazily negated view: pass tensor.resolve_neg()");
    taken.push_back({name, tensor, tensor.detach(), tensor.const_data_ptr()});
    return taken.back().tensor;
  }

  OptionalTensor take(const OptionalTensor& tensor, const std::string& name, at::IntArrayRef shape, bool optional) {
    TORCH_CHECK(tensor || optional, "Decoder: ", name, " must be a tensor, got None");
    return tensor ? OptionalTensor(take(*tensor, name, shape)) : std::nullopt;
  }

  // Of any number of rows if `rows` is not positive.
  Linear take_matrix(const OptionalTensor& tensor, const std::string& name, int64_t rows, int64_t cols) {
    TORCH_CHECK(tensor, "Decoder: ", name, " must be a tensor, got None");
    TORCH_CHECK(tensor->dim() == 2 && tensor->numel() > 0, "Decoder: ", name,
                " must be a matrix with rows and columns, got shape ", tensor->sizes());
    if (rows <= 0) rows = tensor->size(0);
    Linear matrix;
    matrix.cols = cols;
    if (tensor->scalar_type() != at::kUInt32) {
      matrix.weight = take(*tensor, name, {rows, cols});
      return matrix;
    }
    TORCH_CHECK(next_group_ + 2 <= groups_.size(), "Decoder: groups must have the scales and the biases of ", name);
    const Tensor &scales = groups_[next_group_], &biases = groups_[next_group_ + 1];
    next_group_ += 2;
    matrix.bits = tensor->size(1) * 32 / cols;
    TORCH_CHECK((matrix.bits == 4 || matrix.bits == 8) && tensor->size(1) * 32 == matrix.bits * cols, "Decoder: ", name,
                " must have rows of ", cols, " codes of 4 or 8 bits, got ", tensor->size(1), " words");
    const int64_t groups = scales.dim() == 2 ? scales.size(1) : 0;
    matrix.group_size = groups > 0 ? cols / groups : 0;
    TORCH_CHECK((matrix.group_size == 32 || matrix.group_size == 64 || matrix.group_size == 128) &&
                    matrix.group_size * groups == cols,
                "Decoder: scales of ", name, " must be one for each 32, 64 or 128 of its ", cols,
                " columns, got shape ", scales.sizes());
    matrix.weight = take(*tensor, name, {rows, tensor->size(1)}, true);
    matrix.scales = take(scales, "scales of " + name, {rows, groups});
    matrix.group_biases = take(biases, "biases of " + name, {rows, groups});
    TORCH_CHECK(biases.scalar_type() == scales.scalar_type(), "Decoder: biases of ", name,
                " must have the dtype of its scales, ", scales.scalar_type(), ", got ", biases.scalar_type());
    return matrix;
  }

  Adapter take_adapter(const Tensor& a, const Tensor& b, double scale, const std::string& of, const Linear& matrix) {
    const int64_t rank = a.dim() == 2 ? a.size(0) : 0;
    TORCH_CHECK(rank >= 1 && rank <= kMostRank, "Decoder: a of the adapter of ", of, " must be (rank, ", matrix.cols,
                ") with a rank of 1 to ", kMostRank, ", got shape ", a.sizes());
    TORCH_CHECK(std::isfinite(scale), "Decoder: the scale of the adapter of ", of, " must be finite, got ", scale);
    Adapter adapter;
    adapter.a.cols = matrix.cols;
    adapter.a.weight = take(a, "a of the adapter of " + of, {rank, matrix.cols});
    adapter.b.cols = rank;
    adapter.b.weight = take(b, "b of the adapter of " + of, {matrix.rows(), rank});
    adapter.scale = scale;
    return adapter;
  }

  void check_no_groups_left() const {
    TORCH_CHECK(next_group_ == groups_.size(), "Decoder: groups must have two tensors for each packed matrix, ",
                next_group_, " in all, got ", groups_.size());
  }

  std::vector<Decoder::Taken> taken;

 private:
  c10::Device device_;
  const std::vector<Tensor>& groups_;
  size_t next_group_ = 0;
};

namespace {

// The matrices of a layer by their places among its parts.
const std::map<int64_t, std::pair<const char*, Linear DecoderLayer::*>> kMatrices = {
    {1, {"q", &DecoderLayer::q}},       {3, {"k", &DecoderLayer::k}},        {5, {"v", &DecoderLayer::v}},
    {9, {"o", &DecoderLayer::o}},       {13, {"gate", &DecoderLayer::gate}}, {14, {"up", &DecoderLayer::up}},
    {15, {"down", &DecoderLayer::down}}};

int64_t rows_of(const OptionalTensor& matrix, const char* name) {
  TORCH_CHECK(matrix && matrix->dim() == 2 && matrix->numel() > 0, "Decoder: ", name,
              " of layer 0 must be a matrix with rows and columns");
  return matrix->size(0);
}

}  // namespace

Decoder::Decoder(const Tensor& embedding_, const std::vector<OptionalTensor>& parts, const Tensor& norm_,
                 const Tensor& head_, const std::vector<Tensor>& groups, int64_t heads_,
                 const std::vector<double>& numbers_, const std::string& activation_,
                 const std::vector<int64_t>& windows, const std::vector<int64_t>& tables, bool int8_products_,
                 const std::vector<Tensor>& adapters, const std::vector<int64_t>& adapter_places,
                 const std::vector<double>& adapter_scales)
    : heads(heads_),
      numbers(numbers_of(numbers_)),
      activation(activation_of(activation_)),
      int8_products(int8_products_) {
  const bool packed = embedding_.scalar_type() == at::kUInt32;  // its words do not tell their columns
  const Tensor& sized = packed ? norm_ : embedding_;
  TORCH_CHECK(sized.dim() == (packed ? 1 : 2) && sized.numel() > 0,
              "Decoder: ", packed ? "norm must be (hidden,)" : "embedding must be (vocabulary, hidden)", ", got shape ",
              sized.sizes());
  hidden = sized.size(-1);
  Reader reader(embedding_, groups);
  embedding = reader.take_matrix(embedding_, "embedding", 0, hidden);
  head = reader.take_matrix(head_, "head", 0, hidden);
  vocabulary = head.rows();
  norm = reader.take(norm_, "norm", {hidden});
  const size_t count = parts.size() / kLayerParts;
  TORCH_CHECK(count >= 1 && count * kLayerParts == parts.size(), "Decoder: layers must have ", kLayerParts,
              " entries for each layer, got ", parts.size());
  TORCH_CHECK(windows.size() == count && std::all_of(windows.begin(), windows.end(), [](int64_t w) { return w >= 0; }),
              "Decoder: windows must be a number for each of the ", count, " layers, 0 for none, got ", windows);
  TORCH_CHECK(tables.size() == count && std::all_of(tables.begin(), tables.end(), [](int64_t t) { return t >= -1; }),
              "Decoder: tables must be a number for each of the ", count, " layers, -1 for none, got ", tables);
  const int64_t q_rows = rows_of(parts[1], "q"), kv_rows = rows_of(parts[3], "k");
  TORCH_CHECK(heads >= 1 && q_rows % heads == 0, "Decoder: heads must divide the rows of q, ", q_rows, ", got ", heads);
  head_dim = q_rows / heads;
  kv_heads = kv_rows / head_dim;
  TORCH_CHECK(kv_heads >= 1 && kv_heads * head_dim == kv_rows && heads % kv_heads == 0,
              "Decoder: k of layer 0 must have rows for a number of heads of ", head_dim, " that divides ", heads,
              ", got ", kv_rows);
  for (size_t i = 0; i < count; ++i) {
    size_t next = i * kLayerParts;
    const std::string of_layer = " of layer " + std::to_string(i);
    const auto vector = [&](const char* name, int64_t size, bool optional = false) {
      return reader.take(parts[next++], name + of_layer, {size}, optional);
    };
    const auto matrix = [&](const char* name, int64_t rows, int64_t cols) {
      return reader.take_matrix(parts[next++], name + of_layer, rows, cols);
    };
    const auto linear = [&](const char* name, int64_t rows, int64_t cols) {
      Linear result = matrix(name, rows, cols);
      result.bias = vector((std::string(name) + "_bias").c_str(), rows, true);
      return result;
    };
    DecoderLayer layer;
    // A norm of each head, or of all heads as one.
    const auto head_norm = [&](const char* name, int64_t rows) {
      const OptionalTensor& weight = parts[next];
      return vector(name, weight && weight->dim() == 1 && weight->size(0) == rows ? rows : head_dim, true);
    };
    layer.input_norm = vector("input_norm", hidden, true);
    layer.q = linear("q", q_rows, hidden);
    layer.k = linear("k", kv_rows, hidden);
    layer.v = linear("v", kv_rows, hidden);
    layer.q_norm = head_norm("q_norm", q_rows);
    layer.k_norm = head_norm("k_norm", kv_rows);
    layer.o = linear("o", hidden, q_rows);
    layer.attention_output_norm = vector("attention_output_norm", hidden, true);
    layer.post_attention_norm = vector("post_attention_norm", hidden, true);
    const bool routed = parts[next + 4].has_value();
    if (!routed || parts[next]) {
      layer.gate = matrix("gate", 0, hidden);
      layer.up = matrix("up", layer.gate.rows(), hidden);
      layer.down = matrix("down", hidden, layer.gate.rows());
      intermediate = std::max(intermediate, layer.gate.rows());
    } else {
      for (const char* name : {"gate", "up", "down"}) {
        TORCH_CHECK(!parts[next++], "Decoder: ", name, of_layer, " must be None, as gate is");
      }
    }
    layer.feed_forward_output_norm = vector("feed_forward_output_norm", hidden, true);
    if (routed) take_experts(reader, layer, parts, next, of_layer);
    next += 5;
    if (layer.has_feed_forward())
      TORCH_CHECK(layer.up.weight.scalar_type() == layer.gate.weight.scalar_type(), "Decoder: up", of_layer,
                  " must have gate's dtype ", layer.gate.weight.scalar_type(), ", got ", layer.up.weight.scalar_type());
    TORCH_CHECK(layer.up.is_like(layer.gate), "Decoder: up", of_layer,
                " must be packed as gate is, with the same bits, groups and dtype of the scales");
    layer.window = windows[i];
    layer.table = tables[i];
    layers.push_back(std::move(layer));
  }
  reader.check_no_groups_left();
  if (numbers.chosen() == 0) TORCH_CHECK(experts == 0, "Decoder: experts_per_token must be at least 1 with a router");
  TORCH_CHECK(adapters.size() == 2 * adapter_places.size() && adapter_scales.size() == adapter_places.size(),
              "Decoder: adapters must be two tensors and a scale for each of their ", adapter_places.size(),
              " places, got ", adapters.size(), " and ", adapter_scales.size());
  for (size_t i = 0; i < adapter_places.size(); ++i) {
    const int64_t place = adapter_places[i], parts_in_all = static_cast<int64_t>(count * kLayerParts);
    const auto found = kMatrices.find(place >= 0 && place < parts_in_all ? place % int64_t{kLayerParts} : -1);
    TORCH_CHECK(found != kMatrices.end(), "Decoder: adapter_places must be the places of matrices in layers, got ",
                place);
    Linear& matrix = layers[place / kLayerParts].*found->second.second;
    const std::string name = std::string(found->second.first) + " of layer " + std::to_string(place / kLayerParts);
    matrix.adapters.push_back(
        reader.take_adapter(adapters[2 * i], adapters[2 * i + 1], adapter_scales[i], name, matrix));
  }
  taken = std::move(reader.taken);
  for (const Taken& part : taken) memory.add(part.tensor);
}

void Decoder::take_experts(Reader& reader, DecoderLayer& layer, const std::vector<OptionalTensor>& parts, size_t next,
                           const std::string& of_layer) {
  layer.router = reader.take_matrix(parts[next], "router" + of_layer, 0, hidden);
  const int64_t count = layer.router.rows();
  TORCH_CHECK(!layer.router.is_packed() && count <= kMostExperts && numbers.chosen() <= count, "Decoder: router",
              of_layer, " must be a dense matrix with at least experts_per_token = ", numbers.chosen(),
              " rows, and at most ", kMostExperts, ", got ", count);
  const auto all_experts = [&](size_t place, const char* name, int64_t rows, int64_t cols) {
    TORCH_CHECK(parts[place] && parts[place]->dim() == 3, "Decoder: ", name, of_layer, " must be (", count,
                ", rows, columns)");
    return reader.take(*parts[place], name + of_layer, {count, rows > 0 ? rows : parts[place]->size(1), cols});
  };
  layer.experts_gate = all_experts(next + 1, "experts_gate", 0, hidden);
  const int64_t rows = layer.experts_gate.size(1);
  TORCH_CHECK(rows > 0, "Decoder: experts_gate", of_layer, " must have rows");
  layer.experts_up = all_experts(next + 2, "experts_up", rows, hidden);
  layer.experts_down = all_experts(next + 3, "experts_down", hidden, rows);
  TORCH_CHECK(layer.experts_up.scalar_type() == layer.experts_gate.scalar_type(), "Decoder: experts_up", of_layer,
              " must have the dtype of experts_gate, ", layer.experts_gate.scalar_type(), ", got ",
              layer.experts_up.scalar_type());
  if (parts[next + 4]) {
    layer.shared_gate = reader.take_matrix(parts[next + 4], "shared_gate" + of_layer, 1, hidden);
    TORCH_CHECK(layer.has_feed_forward() && !layer.shared_gate.is_packed(), "Decoder: shared_gate", of_layer,
                " must be dense, beside a gate, an up and a down");
  }
  TORCH_CHECK(!layer.feed_forward_output_norm, "Decoder: feed_forward_output_norm", of_layer,
              " must be None beside experts");
  experts = std::max(experts, count);
  expert_intermediate = std::max(expert_intermediate, rows);
}

bool Linear::is_like(const Linear& other) const {
  return weight.scalar_type() == other.weight.scalar_type() && bits == other.bits && group_size == other.group_size &&
         (!is_packed() || scales.scalar_type() == other.scales.scalar_type());
}

const Decoder::Taken* Decoder::changed() const {
  for (const Taken& part : taken) {
    const Tensor &now = part.original, &then = part.tensor;
    if (now.const_data_ptr() != part.data || now.sizes() != then.sizes() || now.strides() != then.strides() ||
        now.scalar_type() != then.scalar_type()) {
      return &part;
    }
  }
  return nullptr;
}

namespace {

// What the decoder was made from, for the reference and for torch.compile.
auto arguments_of(const DecoderPtr& model) {
  std::vector<OptionalTensor> layers;
  std::vector<int64_t> windows, tables;
  for (const DecoderLayer& l : model->layers) {
    layers.insert(layers.end(), {l.input_norm,
                                 l.q.weight,
                                 l.q.bias,
                                 l.k.weight,
                                 l.k.bias,
                                 l.v.weight,
                                 l.v.bias,
                                 l.q_norm,
                                 l.k_norm,
                                 l.o.weight,
                                 l.o.bias,
                                 l.attention_output_norm,
                                 l.post_attention_norm,
                                 l.gate.weight,
                                 l.up.weight,
                                 l.down.weight,
                                 l.feed_forward_output_norm,
                                 l.router.weight,
                                 l.experts_gate,
                                 l.experts_up,
                                 l.experts_down,
                                 l.shared_gate.weight});
    for (auto part = layers.end() - kLayerParts; part != layers.end(); ++part) {
      if (*part && !(*part)->defined()) *part = std::nullopt;
    }
    windows.push_back(l.window);
    tables.push_back(l.table);
  }
  std::vector<Tensor> groups;
  const auto add_groups = [&](const Linear& matrix) {
    if (matrix.is_packed()) groups.insert(groups.end(), {matrix.scales, matrix.group_biases});
  };
  add_groups(model->embedding);
  add_groups(model->head);
  for (const DecoderLayer& l : model->layers) {
    for (const Linear* matrix : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down}) add_groups(*matrix);
  }
  const DecoderNumbers& n = model->numbers;
  const std::vector<double> numbers{
      n.eps,          n.scaling,           n.norm_offset,    n.embedding_scale,   n.residual_scale,
      n.logits_scale, n.attention_softcap, n.logits_softcap, n.experts_per_token, n.normalise_experts};
  std::vector<Tensor> adapters;
  std::vector<int64_t> places;
  std::vector<double> scales;
  for (size_t i = 0; i < model->layers.size(); ++i) {
    for (const auto& [place, matrix] : kMatrices) {
      for (const Adapter& adapter : (model->layers[i].*matrix.second).adapters) {
        adapters.insert(adapters.end(), {adapter.a.weight, adapter.b.weight});
        places.push_back(static_cast<int64_t>(i * kLayerParts) + place);
        scales.push_back(adapter.scale);
      }
    }
  }
  return std::make_tuple(model->embedding.weight, layers, model->norm, model->head.weight, groups, model->heads,
                         numbers, std::string(kActivations[model->activation]), windows, tables, model->int8_products,
                         adapters, places, scales);
}

}  // namespace

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
  for (const Tensor& buffer : buffers) {
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
    TORCH_CHECK(call.length <= buffer.size(2) - call.steps, "decode_: ", name, " must have room for ", call.steps,
                " tokens after length = ", call.length, ", got a capacity of ", buffer.size(2));
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
                        TensorList values, int64_t length, int64_t logits_to_keep) {
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
                  0};
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

// ---- CPU ------------------------------------------------------------------------------------------------------------

namespace {

constexpr int64_t kChunk = 64;  // slots that a chunk of the context should at least have

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
                                 linear.group_biases.stride(0)};
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

CacheStates<void> states_of(const Tensor& buffer) {
  return {buffer.mutable_data_ptr(), buffer.stride(0), buffer.stride(1), buffer.stride(2)};
}

// The projection of the values is multiplied as floats: it is small, and its errors come through attention unweakened.
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
  l.keys = states_of(call.keys[index]);
  l.values = states_of(call.values[index]);
  l.window = layer.window;
  l.cos = vector_of(call.table_of(call.cos, layer));
  l.sin = vector_of(call.table_of(call.sin, layer));
  l.rotary_dim = call.rotary_dim_of(layer);
  return l;
}

// So many chunks that all threads have as much to do, if the context is long enough to be worth it.
int64_t count_chunks(const StepShape& s) {
  const int64_t heads = s.batch * s.kv_heads, even = s.threads / std::gcd(heads, s.threads);
  const int64_t wanted = (4 * s.threads + heads - 1) / heads, most = s.length / kChunk;
  const int64_t chunks = std::min((wanted + even - 1) / even * even, most);
  return chunks >= even ? chunks / even * even : std::max<int64_t>(1, chunks);
}

// With the best instructions that the machine has, or that ATEN_CPU_CAPABILITY allows torch.
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
                  TensorList values, int64_t length, int64_t logits_to_keep) {
  const DecodeCall call =
      check_decode(model, token_ids, positions, starts, cos, sin, keys, values, length, logits_to_keep);
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
  const Tensor logits = at::empty({s.batch, s.kept, s.vocabulary}, floats);
  const Tensor memory = at::empty({std::accumulate(std::begin(sizes), std::end(sizes), int64_t{0})}, floats);
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

// ---- autograd -------------------------------------------------------------------------------------------------------

namespace {

// Not differentiable, but autograd must know that the cache has changed.
Tensor decode_autograd(const DecoderPtr& model, const Tensor& token_ids, const Tensor& positions,
                       const OptionalTensor& starts, const Tensor& cos, const Tensor& sin, TensorList keys,
                       TensorList values, int64_t length, int64_t logits_to_keep) {
  for (const Decoder::Taken& part : model->taken) {
    check_not_differentiated("decode_", part.name.c_str(), part.original);
  }
  check_not_differentiated("decode_", "cos", cos);
  check_not_differentiated("decode_", "sin", sin);
  for (const auto& [name, buffers] : {std::pair("keys", keys), std::pair("values", values)}) {
    for (const Tensor& buffer : buffers) check_not_differentiated("decode_", name, buffer);
  }
  static const auto op = find_op<decltype(decode_cpu)>("torch_fused::decode_");
  return change({keys, values}, [&] {
    return op.call(model, token_ids, positions, starts, cos, sin, keys, values, length, logits_to_keep);
  });
}

// ---- with the choice of the next token ------------------------------------------------------------------------------

Tensor decode_token(const DecoderPtr& model, const Tensor& token_ids, const Tensor& positions,
                    const OptionalTensor& starts, const Tensor& cos, const Tensor& sin, TensorList keys,
                    TensorList values, int64_t length, bool do_sample, double temperature, std::optional<int64_t> top_k,
                    std::optional<double> top_p, std::optional<double> min_p) {
  if (do_sample) check_filters("decode_token_", temperature, top_k, top_p, min_p);  // before the cache is written
  // What could not be drawn from must not be appended to the cache.
  TORCH_CHECK(model->vocabulary <= kMostTokens, "decode_token_: head must have 1 to ", kMostTokens,
              " rows to choose from, got ", model->vocabulary);
  if (do_sample) {
    const Tensor row = at::empty({1}, cos.options().dtype(at::kFloat)).expand({1, model->vocabulary});
    check_sampling("decode_token_", row, temperature, top_k, top_p, min_p, std::nullopt);
  }
  static const auto decode = find_op<decltype(decode_cpu)>("torch_fused::decode_");
  const Tensor logits = decode.call(model, token_ids, positions, starts, cos, sin, keys, values, length, 1).squeeze(1);
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
      .def("arguments", arguments_of)
      .def("is_current", [](const DecoderPtr& model) { return !model->changed(); })
      // What torch.compile traces in its place; ops/decode.py has the class.
      .def("__obj_flatten__", [](const DecoderPtr& model) {
        const auto [embedding, layers, norm, head, groups, heads, numbers, activation, windows, tables, int8_products,
                    adapters, adapter_places, adapter_scales] = arguments_of(model);
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
      "Tensor cos, Tensor sin, Tensor(a!)[] keys, Tensor(b!)[] values, int length, int logits_to_keep) -> Tensor");
  m.def(
      "decode_token_(__torch__.torch.classes.torch_fused.Decoder model, Tensor token_ids, Tensor positions, "
      "Tensor? starts, Tensor cos, Tensor sin, Tensor(a!)[] keys, Tensor(b!)[] values, int length, bool do_sample, "
      "float temperature, int? top_k, float? top_p, float? min_p) -> Tensor",
      {at::Tag::nondeterministic_seeded});
}
TORCH_LIBRARY_IMPL(torch_fused, CompositeImplicitAutograd, m) {
  m.impl("decode_token_", torch_fused::decode_token);
}
TORCH_LIBRARY_IMPL(torch_fused, Autograd, m) {
  m.impl("decode_", torch_fused::decode_autograd);
}
TORCH_FUSED_WRITES(decode_)
