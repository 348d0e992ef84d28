// A decode step on a GPU: five launches a layer, one for the embedding and one for the head.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>

#include "../common/registration.h"
#include "../common/rows.h"
#include "../runtime/launch.h"
#include "decode.h"

namespace torch_fused {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kChunkSlots = 32;  // slots of the context that a chunk of attention should at least have
constexpr int64_t kMostChunks = 32;  // more cost more to put together than they save
constexpr int64_t kFewGroups = 16;   // threadgroups of attention; where there are more anyway, chunks are larger
constexpr int64_t kGroups = 128;     // and so many fill a GPU
constexpr int64_t kMostSplits = 8;
constexpr int64_t kFewRows = 8192;     // a product with more rows fills a GPU without splitting them
constexpr int64_t kSimdgroups = 4096;  // and so many simdgroups, each with several vectors
constexpr int64_t kAttendedRows = 4;   // of a simdgroup behind attention

// What decode_product.metal instantiates: vectors, rows and blocks at once. The variant 0 takes operands of any layout
// and type.
struct Width {
  int64_t variant, vectors, rows, blocks;
};
Width width_for(int64_t vectors, bool whole, bool gated) {
  if (!whole) return {0, 1, 2, 1};
  if (vectors > 1) return {8, 8, 4, 1};
  return gated ? Width{1, 1, 4, 2} : Width{1, 1, 2, 4};
}

// One step: its memory, and its launches so far.
struct Step {
  const DecodeCall& call;
  const Decoder& model;
  Tensor states, qkv, attended, stats, gates, logits;
  int64_t chunks;
  LaunchList launches;
};

// What a product reads and writes besides its matrices.
struct Vectors {
  const Tensor& from;
  const Tensor& to;
  const Tensor* norm;  // null for none
  int64_t steps, kept;
  bool add;
};

// Whether a fast kernel for `dtype` can read a matrix or a vector.
bool is_whole(const Tensor& tensor, at::ScalarType dtype) {
  return tensor.scalar_type() == dtype && rows_aligned(tensor, tensor.dim() > 1 ? tensor.stride(0) : 0);
}

// Matrices of one dtype, one below the other; two that gate if `gated`.
void multiply(Step& step, std::initializer_list<const Linear*> matrices, const Vectors& v, bool gated) {
  static KernelSet plain("decode_product", "decode_product"), gating("decode_product", "decode_gated");
  const Linear& first = **matrices.begin();
  ProductParams p{};
  p.cols = static_cast<uint32_t>(first.weight.size(1));
  p.vectors = static_cast<uint32_t>(step.call.batch * v.kept);
  p.steps = static_cast<uint32_t>(v.steps);
  p.kept = static_cast<uint32_t>(v.kept);
  p.result_stride = static_cast<uint32_t>(v.to.stride(-2));
  p.eps = static_cast<float>(step.model.eps);
  const at::ScalarType dtype = first.weight.scalar_type();
  bool whole = p.cols % kLaneColumns == 0;
  p.flags = v.add ? kAdd : 0;
  Tensor weights[3], biases[3];
  int64_t results = 0;
  size_t i = 0;
  for (const Linear* matrix : matrices) {
    weights[i] = matrix->weight;
    biases[i] = matrix->bias.value_or(matrix->weight);
    if (matrix->bias) p.flags |= kBias << i, p.bias_format = format_of(*matrix->bias);
    whole = whole && is_whole(weights[i], dtype) && (!matrix->bias || matrix->bias->scalar_type() == dtype);
    results += gated && i > 0 ? 0 : matrix->weight.size(0);
    p.strides[i] = matrix->weight.stride(0);
    p.ends[i] = static_cast<uint32_t>(results);
    ++i;
  }
  for (; i < 3; ++i) {
    weights[i] = biases[i] = first.weight;
    p.strides[i] = p.strides[0];
    p.ends[i] = static_cast<uint32_t>(results);
  }
  if (v.norm) {
    p.flags |= kNormed;
    p.norm_format = format_of(*v.norm);
    whole = whole && is_whole(*v.norm, dtype);
  }

  const Width width = width_for(p.vectors, whole, gated);
  const int64_t blocks = (p.cols + kBlockColumns - 1) / kBlockColumns;
  const int64_t outputs = gated ? width.rows / 2 : width.rows;
  const int64_t enough = width.vectors > 1 ? kSimdgroups * outputs / results : results <= kFewRows ? kMostSplits : 1;
  const int64_t most = std::min((blocks + width.blocks - 1) / width.blocks, kMostSplits);
  p.splits = static_cast<uint32_t>(std::clamp<int64_t>(enough, 1, most));
  const int64_t simdgroups = (kProductSimdgroups + p.splits - 1) / p.splits * p.splits;
  const int64_t rows = simdgroups / p.splits * outputs;
  const int64_t groups = (results + rows - 1) / rows * ((p.vectors + width.vectors - 1) / width.vectors);
  step.launches.add((gated ? gating : plain)(first.weight, width.variant), groups, 32 * simdgroups,
                    {weights[0], weights[1], weights[2], biases[0], biases[1], biases[2], v.from,
                     v.norm ? *v.norm : first.weight, v.to},
                    p);
}

// The product behind attention, whose chunks it puts together if there are several.
void multiply_attended(Step& step, const Linear& o) {
  const int64_t steps = step.call.steps;
  if (step.chunks == 1) return multiply(step, {&o}, {step.attended, step.states, nullptr, steps, steps, true}, false);
  static KernelSet kernels("decode_attended", "decode_attended");
  const Tensor& weight = o.weight;
  AttendedParams p{};
  p.stride = weight.stride(0);
  p.rows = static_cast<uint32_t>(weight.size(0));
  p.cols = static_cast<uint32_t>(weight.size(1));
  p.vectors = static_cast<uint32_t>(step.call.tokens());
  p.chunks = static_cast<uint32_t>(step.chunks);
  p.head_dim = static_cast<uint32_t>(step.model.head_dim);
  if (o.bias) p.flags |= kBias, p.bias_format = format_of(*o.bias);
  const bool whole = p.cols % kLaneColumns == 0 && p.head_dim % kLaneColumns == 0 &&
                     is_whole(weight, weight.scalar_type()) &&
                     (!o.bias || o.bias->scalar_type() == weight.scalar_type());
  const int64_t variant = !whole ? 0 : p.vectors == 1 ? 1 : 8, vectors = variant == 8 ? 8 : 1;
  const int64_t rows = kProductSimdgroups * kAttendedRows;
  const int64_t groups = (p.rows + rows - 1) / rows * ((p.vectors + vectors - 1) / vectors);
  step.launches.add(kernels(weight, variant), groups, 32 * kProductSimdgroups,
                    {weight, o.bias.value_or(weight), step.attended, step.stats, step.states}, p);
}

// Each on its own where their formats differ.
void multiply_qkv(Step& step, const DecoderLayer& layer) {
  const Vectors v{step.states, step.qkv, &layer.input_norm, step.call.steps, step.call.steps, false};
  const auto alike = [](const Linear& a, const Linear& b) {
    return a.weight.scalar_type() == b.weight.scalar_type() &&
           (!a.bias || !b.bias || a.bias->scalar_type() == b.bias->scalar_type());
  };
  if (alike(layer.q, layer.k) && alike(layer.q, layer.v) && alike(layer.k, layer.v)) {
    return multiply(step, {&layer.q, &layer.k, &layer.v}, v, false);
  }
  int64_t first = 0;
  for (const Linear* matrix : {&layer.q, &layer.k, &layer.v}) {
    const int64_t rows = matrix->weight.size(0);
    const Tensor results = step.qkv.narrow(1, first, rows);
    multiply(step, {matrix}, {v.from, results, v.norm, v.steps, v.kept, false}, false);
    first += rows;
  }
}

void attend(Step& step, size_t index) {
  static KernelSet any("decode_attention", "decode_attention"), dim_64("decode_attention", "decode_attention_64"),
      dim_128("decode_attention", "decode_attention_128");
  const DecodeCall& call = step.call;
  const Decoder& model = step.model;
  const DecoderLayer& layer = model.layers[index];
  const Tensor &keys = call.keys[index], &values = call.values[index];
  AttentionParams p{};
  p.keys_batch = keys.stride(0), p.keys_head = keys.stride(1), p.keys_slot = keys.stride(2);
  p.values_batch = values.stride(0), p.values_head = values.stride(1), p.values_slot = values.stride(2);
  p.length = call.length;
  p.window = layer.window;
  p.steps = static_cast<uint32_t>(call.steps);
  p.heads = static_cast<uint32_t>(model.heads);
  p.kv_heads = static_cast<uint32_t>(model.kv_heads);
  p.head_dim = static_cast<uint32_t>(model.head_dim);
  p.rotary_dim = static_cast<uint32_t>(call.rotary_dim);
  p.positions = static_cast<uint32_t>(call.cos.size(0));
  p.chunks = static_cast<uint32_t>(step.chunks);
  p.table_format = format_of(call.cos);
  p.eps = static_cast<float>(model.eps);
  p.scaling = static_cast<float>(model.scaling / std::log(2.0));
  const at::ScalarType dtype = keys.scalar_type();
  const auto aligned = [&](const Tensor& t) {
    return rows_aligned(t, t.stride(0)) && rows_aligned(t, t.stride(1)) && rows_aligned(t, t.stride(2));
  };
  const auto alike = [&](const OptionalTensor& t) { return !t || t->scalar_type() == dtype; };
  const bool whole = aligned(keys) && aligned(values) && alike(layer.q_norm) && alike(layer.k_norm) && alike(call.cos);
  if (call.starts) p.flags |= kStarts;
  if (layer.q_norm) p.flags |= kQueryNorm, p.q_norm_format = format_of(*layer.q_norm);
  if (layer.k_norm) p.flags |= kKeyNorm, p.k_norm_format = format_of(*layer.k_norm);
  KernelSet* kernels = !whole || model.head_dim % 64 > 0 ? &any : model.head_dim == 64 ? &dim_64 : &dim_128;
  if (model.head_dim > 128) kernels = &any;
  step.launches.add((*kernels)(keys), call.batch * model.kv_heads * step.chunks, 32 * kAttentionSimdgroups,
                    {step.qkv, keys, values, layer.q_norm.value_or(call.cos), layer.k_norm.value_or(call.cos), call.cos,
                     call.sin, call.positions, call.starts.value_or(call.positions), step.attended, step.stats},
                    p);
}

}  // namespace

Tensor decode_gpu(const DecoderPtr& decoder, const Tensor& token_ids, const Tensor& positions,
                  const OptionalTensor& starts, const Tensor& cos, const Tensor& sin, at::TensorList keys,
                  at::TensorList values, int64_t length, int64_t logits_to_keep) {
  static KernelSet embed("decode_product", "decode_embed");
  const DecodeCall call =
      check_decode(decoder, token_ids, positions, starts, cos, sin, keys, values, length, logits_to_keep);
  const Decoder& model = *decoder;
  TORCH_CHECK(model.head_dim <= kMostHeadDim, "decode_: on a GPU heads have at most ", kMostHeadDim,
              " dimensions, got ", model.head_dim);
  const auto floats = model.embedding.options().dtype(at::kFloat);
  const int64_t tokens = call.tokens(), heads = model.heads, dim = model.head_dim;
  const int64_t groups = call.batch * model.kv_heads;
  const int64_t most_chunks = std::clamp<int64_t>(kGroups / groups, 1, kMostChunks);
  const int64_t chunk_slots = kChunkSlots * std::max<int64_t>(1, groups / kFewGroups);
  const int64_t chunks = std::clamp<int64_t>(call.length / chunk_slots, 1, most_chunks);
  const auto room = [&](int64_t each) { return at::empty({tokens, each}, floats); };
  Step step{call,
            model,
            room(model.hidden),
            room(call.projected()),
            room(heads * chunks * dim),
            room(heads * chunks * 2),
            room(model.intermediate),
            at::empty({call.batch, call.kept, model.vocabulary}, floats),
            chunks,
            {}};
  const EmbedParams p{model.embedding.stride(0), static_cast<uint32_t>(model.hidden),
                      static_cast<uint32_t>(model.embedding.size(0))};
  step.launches.add(embed(model.embedding), tokens, 256, {model.embedding, call.token_ids, step.states}, p);
  const int64_t steps = call.steps;
  for (size_t i = 0; i < model.layers.size(); ++i) {
    const DecoderLayer& layer = model.layers[i];
    multiply_qkv(step, layer);
    attend(step, i);
    multiply_attended(step, layer.o);
    multiply(step, {&layer.gate, &layer.up}, {step.states, step.gates, &layer.post_attention_norm, steps, steps, false},
             true);
    multiply(step, {&layer.down}, {step.gates, step.states, nullptr, steps, steps, true}, false);
  }
  const Linear head{model.head, std::nullopt};
  multiply(step, {&head}, {step.states, step.logits, &model.norm, steps, call.kept, false}, false);
  step.launches.run(model.repeats);
  return step.logits;
}

}  // namespace torch_fused

using namespace torch_fused;
TORCH_FUSED_KERNELS_NAMED(decode_, decode)
