// The products of a decode step on a GPU: which kernel multiplies a matrix, in how many threadgroups.
#include <algorithm>
#include <array>
#include <functional>

#include "../common/rows.h"
#include "../quantized/packed_tiles.h"
#include "gpu_step.h"

namespace torch_fused {
namespace {

using at::Tensor;

constexpr int64_t kMostSplits = 8;
constexpr int64_t kFewRows = 8192;           // a product with more rows fills a GPU without splitting them
constexpr int64_t kSimdgroups = 4096;        // and so many simdgroups, each with several vectors
constexpr int64_t kPackedSimdgroups = 2048;  // or with packed rows, or on the matrix units
constexpr int64_t kAttendedRows = 4;         // of a simdgroup after attention

// What the sources instantiate: vectors, rows and columns of a simdgroup at once. The variant 0 takes operands of any
// layout and type.
struct Width {
  int64_t variant, vectors, rows, columns;
};
Width width_for(int64_t vectors, bool whole, bool gated, bool packed, bool tiles) {
  if (tiles) return {0, kTileVectors, 16, kTileColumns};
  if (!whole) return {0, 1, 2, kBlockColumns};
  if (vectors > 1) return {8, 8, 4, kBlockColumns};
  if (packed) return {1, 1, 4, (gated ? 2 : 1) * 2 * kBlockColumns};
  return gated ? Width{1, 1, 4, 2 * kBlockColumns} : Width{1, 1, 2, 4 * kBlockColumns};
}

// Simdgroups that share a row: enough to fill a GPU, each with the same number of columns.
int64_t splits_for(const Width& width, int64_t rows, int64_t outputs, int64_t cols, bool packed, bool tiles) {
  int64_t enough = rows <= kFewRows ? kMostSplits : 1;
  if (packed || tiles) enough = kPackedSimdgroups * outputs / rows;
  if (width.vectors > 1 && !tiles) enough = kSimdgroups * outputs / rows;
  const auto ceiling = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t spans = std::max<int64_t>(1, ceiling(cols, width.columns));
  const int64_t most = tiles ? kMostTileSimdgroups : kMostSplits;
  return std::clamp<int64_t>(enough, 1, ceiling(spans, ceiling(spans, most)));
}

// Whether a fast kernel for `dtype` can read a matrix or a vector.
bool is_whole(const Tensor& tensor, at::ScalarType dtype) {
  return tensor.scalar_type() == dtype && rows_aligned(tensor, tensor.dim() > 1 ? tensor.stride(0) : 0);
}

// How packed matrices are laid out, in the order of their buffers.
PackedFormat packed_format(std::initializer_list<const Linear*> matrices) {
  const Linear& first = **matrices.begin();
  PackedFormat format{};
  format.group_size = static_cast<uint32_t>(first.group_size);
  format.scale_format = format_of(first.scales);
  format.one = kOne;
  size_t i = 0;
  for (const Linear* matrix : matrices) {
    format.strides[i] = matrix->weight.stride(0);
    format.scale_strides[i] = matrix->scales.stride(0);
    format.bias_strides[i++] = matrix->group_biases.stride(0);
  }
  return format;
}

// The dtype of norms and biases that are read with a matrix. A fast kernel supports only this one.
at::ScalarType dtype_beside(const Linear& matrix) {
  return (matrix.is_packed() ? matrix.scales : matrix.weight).scalar_type();
}

// Whether a fast kernel can read a matrix and its bias.
bool is_whole(const Linear& matrix) {
  const at::ScalarType dtype = dtype_beside(matrix);
  if (matrix.bias && matrix.bias->scalar_type() != dtype) return false;
  return rows_aligned(matrix.weight, matrix.weight.stride(0)) && matrix.cols % kLaneColumns == 0;
}

// A kernel of a kind, "" or "_gated" or "_attended", for packed matrices; the variant 0 is there for one dtype.
const Kernel& packed_kernel(const Linear& matrix, int64_t kind, int64_t variant) {
  static KernelSet sets[2][3] = {{{"decode_packed4", "decode_packed4"},
                                  {"decode_packed4", "decode_packed4_gated"},
                                  {"decode_packed4", "decode_packed4_attended"}},
                                 {{"decode_packed8", "decode_packed8"},
                                  {"decode_packed8", "decode_packed8_gated"},
                                  {"decode_packed8", "decode_packed8_attended"}}};
  return sets[matrix.bits / 8][kind](variant == 0 ? at::kFloat : matrix.scales.scalar_type(), variant);
}

}  // namespace

void multiply(GpuStep& step, std::initializer_list<const Linear*> matrices, const StepVectors& v, bool gated) {
  static KernelSet plain("decode_product", "decode_product"), gating("decode_product", "decode_gated");
  static KernelSet plain_tiles("decode_tiles", "decode_tiles"), gating_tiles("decode_tiles", "decode_tiles_gated");
  const Linear& first = **matrices.begin();
  ProductParams p{};
  p.cols = static_cast<uint32_t>(first.cols);
  p.vectors = static_cast<uint32_t>(step.call.batch * v.kept);
  p.steps = static_cast<uint32_t>(v.steps);
  p.kept = static_cast<uint32_t>(v.kept);
  p.result_stride = static_cast<uint32_t>(v.to.stride(-2));
  p.eps = static_cast<float>(step.model.numbers.eps);
  p.norm_offset = static_cast<float>(step.model.numbers.norm_offset);
  p.scale = static_cast<float>(v.scale);
  p.activation = step.model.activation;
  p.flags = v.add ? kAdd : 0;
  bool whole = !v.norm || is_whole(*v.norm, dtype_beside(first));
  const Linear* each[3] = {&first, &first, &first};
  std::copy(matrices.begin(), matrices.end(), each);
  int64_t results = 0;
  for (size_t i = 0; i < 3; ++i) {
    if (i < matrices.size()) {
      if (each[i]->bias) p.flags |= kBias << i, p.bias_format = format_of(*each[i]->bias);
      whole = whole && is_whole(*each[i]);
      results += gated && i > 0 ? 0 : each[i]->rows();
    }
    p.strides[i] = each[i]->weight.stride(0);
    p.ends[i] = static_cast<uint32_t>(results);
  }
  if (v.norm) p.flags |= kNormed, p.norm_format = format_of(*v.norm);

  const Tensor& norm = v.norm ? *v.norm : step.model.norm;
  const auto bias = [&](size_t i) -> const Tensor& { return each[i]->bias ? *each[i]->bias : step.model.norm; };
  const auto packed_operands = [&]() -> std::array<std::reference_wrapper<const Tensor>, 15> {
    return {each[0]->weight,
            each[1]->weight,
            each[2]->weight,
            each[0]->scales,
            each[1]->scales,
            each[2]->scales,
            each[0]->group_biases,
            each[1]->group_biases,
            each[2]->group_biases,
            bias(0),
            bias(1),
            bias(2),
            v.from,
            norm,
            v.to};
  };
  if (whole && p.vectors == 1 && first.is_packed() &&
      is_tiled(first.scales, first.bits, gated ? 2 * results : results)) {
    static KernelSet plain_packed("packed_tiles", "packed_tiles"), gating_packed("packed_tiles", "packed_tiles_gated");
    const TiledGrid grid = tiled_grid(results, gated ? 8 : 16, first.cols, first.group_size);
    p.splits = grid.splits;
    p.rounds = grid.rounds;
    step.launches.add((gated ? gating_packed : plain_packed)(first.scales.scalar_type(), grid.words), grid.threadgroups,
                      grid.threads, packed_operands(),
                      PackedProductParams{p, packed_format({each[0], each[1], each[2]})});
    return;
  }

  // Several vectors: a tile must lie in one group.
  const bool tiles = whole && p.vectors > 1 && dtype_beside(first) != at::kFloat &&
                     (!first.is_packed() || first.group_size % kTileColumns == 0);
  const Width width = width_for(p.vectors, whole, gated, first.is_packed(), tiles);
  const int64_t outputs = gated ? width.rows / 2 : width.rows;
  p.splits = static_cast<uint32_t>(splits_for(width, results, outputs, p.cols, first.is_packed(), tiles));
  // Tiles take so many registers that small threadgroups fill a GPU better.
  const int64_t least = tiles && p.splits > 1 ? 1 : kProductSimdgroups;
  const int64_t simdgroups = (least + p.splits - 1) / p.splits * p.splits;
  const int64_t rows = simdgroups / p.splits * outputs;
  const int64_t groups = (results + rows - 1) / rows * ((p.vectors + width.vectors - 1) / width.vectors);
  if (first.is_packed()) {
    static KernelSet packed("decode_packed_tiles", "decode_packed_tiles"),
        gating_packed("decode_packed_tiles", "decode_packed_tiles_gated");
    const Kernel& kernel = tiles ? (gated ? gating_packed : packed)(dtype_beside(first), first.bits)
                                 : packed_kernel(first, gated ? 1 : 0, width.variant);
    step.launches.add(kernel, groups, 32 * simdgroups, packed_operands(),
                      PackedProductParams{p, packed_format({each[0], each[1], each[2]})});
  } else {
    const at::ScalarType dtype = first.weight.scalar_type();
    step.launches.add(
        tiles ? (gated ? gating_tiles : plain_tiles)(dtype) : (gated ? gating : plain)(dtype, width.variant), groups,
        32 * simdgroups,
        {each[0]->weight, each[1]->weight, each[2]->weight, bias(0), bias(1), bias(2), v.from, norm, v.to}, p);
  }
}

void multiply_attended(GpuStep& step, const Linear& o, const Tensor& to, bool add, double scale) {
  const int64_t steps = step.call.steps;
  if (step.chunks == 1) return multiply(step, {&o}, {step.attended, to, {}, steps, steps, add, scale}, false);
  static KernelSet kernels("decode_attended", "decode_attended");
  AttendedParams p{};
  p.stride = o.weight.stride(0);
  p.rows = static_cast<uint32_t>(o.rows());
  p.cols = static_cast<uint32_t>(o.cols);
  p.vectors = static_cast<uint32_t>(step.call.tokens());
  p.chunks = static_cast<uint32_t>(step.chunks);
  p.head_dim = static_cast<uint32_t>(step.model.head_dim);
  p.scale = static_cast<float>(scale);
  p.flags = add ? kAdd : 0;
  if (o.bias) p.flags |= kBias, p.bias_format = format_of(*o.bias);
  const bool whole = is_whole(o) && p.head_dim % kLaneColumns == 0;
  const int64_t variant = !whole ? 0 : p.vectors == 1 ? 1 : 8, vectors = variant == 8 ? 8 : 1;
  const int64_t rows = kProductSimdgroups * kAttendedRows;
  const int64_t groups = (p.rows + rows - 1) / rows * ((p.vectors + vectors - 1) / vectors);
  const Tensor& bias = o.bias ? *o.bias : step.model.norm;
  if (o.is_packed()) {
    step.launches.add(packed_kernel(o, 2, variant), groups, 32 * kProductSimdgroups,
                      {o.weight, o.scales, o.group_biases, bias, step.attended, step.stats, to},
                      PackedAttendedParams{p, packed_format({&o})});
  } else {
    step.launches.add(kernels(o.weight.scalar_type(), variant), groups, 32 * kProductSimdgroups,
                      {o.weight, bias, step.attended, step.stats, to}, p);
  }
}

void embed(GpuStep& step) {
  static KernelSet dense("decode_product", "decode_embed");
  static const Kernel* const packed[] = {&find_kernel("decode_packed4", "decode_packed4_embed"),
                                         &find_kernel("decode_packed8", "decode_packed8_embed")};
  const Linear& e = step.model.embedding;
  const EmbedParams p{e.weight.stride(0), static_cast<uint32_t>(e.cols), static_cast<uint32_t>(e.rows()),
                      static_cast<float>(step.model.numbers.embedding_scale), 0};
  const int64_t tokens = step.call.tokens();
  if (e.is_packed()) {
    step.launches.add(*packed[e.bits / 8], tokens, 256,
                      {e.weight, e.scales, e.group_biases, step.call.token_ids, step.states},
                      PackedEmbedParams{p, packed_format({&e})});
  } else {
    step.launches.add(dense(e.weight.scalar_type()), tokens, 256, {e.weight, step.call.token_ids, step.states}, p);
  }
}

void norm_rows(GpuStep& step, const Tensor& from, const Tensor& norm, const Tensor& to, bool add, double scale) {
  static const Kernel& kernel = find_kernel("decode_product", "decode_norm");
  const DecoderNumbers& n = step.model.numbers;
  const StepNormParams p{from.stride(0),
                         to.stride(0),
                         static_cast<uint32_t>(from.size(1)),
                         add ? kAdd : 0,
                         format_of(norm),
                         static_cast<float>(n.eps),
                         static_cast<float>(n.norm_offset),
                         static_cast<float>(scale)};
  step.launches.add(kernel, from.size(0), 256, {from, norm, to}, p);
}

void gate(GpuStep& step, const Tensor& gates, const Tensor& ups) {
  static const Kernel& kernel = find_kernel("decode_product", "decode_gate");
  const GateParams p{static_cast<uint32_t>(gates.numel()), step.model.activation};
  step.launches.add(kernel, (p.count + 255) / 256, 256, {gates, ups}, p);
}

}  // namespace torch_fused
