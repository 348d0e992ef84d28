// A decoder's tensors and numbers: what they must be, and what has changed since.
#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <map>
#include <utility>

#include "../common/checks.h"

namespace torch_fused {

using at::Tensor;

namespace {

constexpr size_t kLayerParts = 22;  // ops/decoder.py has their names

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

Decoder::Arguments Decoder::arguments() const {
  std::vector<OptionalTensor> parts;
  std::vector<int64_t> windows, tables;
  for (const DecoderLayer& l : layers) {
    parts.insert(parts.end(), {l.input_norm,
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
    for (auto part = parts.end() - kLayerParts; part != parts.end(); ++part) {
      if (*part && !(*part)->defined()) *part = std::nullopt;
    }
    windows.push_back(l.window);
    tables.push_back(l.table);
  }
  std::vector<Tensor> groups;
  const auto add_groups = [&](const Linear& matrix) {
    if (matrix.is_packed()) groups.insert(groups.end(), {matrix.scales, matrix.group_biases});
  };
  add_groups(embedding);
  add_groups(head);
  for (const DecoderLayer& l : layers) {
    for (const Linear* matrix : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down}) add_groups(*matrix);
  }
  const DecoderNumbers& n = numbers;
  const std::vector<double> all_numbers{
      n.eps,          n.scaling,           n.norm_offset,    n.embedding_scale,   n.residual_scale,
      n.logits_scale, n.attention_softcap, n.logits_softcap, n.experts_per_token, n.normalise_experts};
  std::vector<Tensor> matrices;
  std::vector<int64_t> places;
  std::vector<double> scales;
  for (size_t i = 0; i < layers.size(); ++i) {
    for (const auto& [place, matrix] : kMatrices) {
      for (const Adapter& adapter : (layers[i].*matrix.second).adapters) {
        matrices.insert(matrices.end(), {adapter.a.weight, adapter.b.weight});
        places.push_back(static_cast<int64_t>(i * kLayerParts) + place);
        scales.push_back(adapter.scale);
      }
    }
  }
  return {embedding.weight,         parts,   norm,   head.weight,   groups,   heads,  all_numbers,
          kActivations[activation], windows, tables, int8_products, matrices, places, scales};
}

}  // namespace torch_fused
