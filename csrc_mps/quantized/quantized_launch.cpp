// Packed matrices on a GPU: operands, kernel, grid and parameters of each launch.
#include <algorithm>
#include <limits>

#include "../common/checks.h"
#include "../common/torch_functions.h"
#include "../decode/decode_params.h"
#include "../runtime/launch.h"
#include "packed_tiles.h"
#include "quantized.h"
#include "quantized_params.h"

namespace torch_fused {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kThreads = 256, kMostSplits = 8;
constexpr int64_t kFewRows = 8192;  // a product with more rows fills a GPU without splitting them

// What quantized.metal instantiates: vectors, rows and blocks at once. The variant 0 takes operands of any alignment,
// and scales of any type.
struct Width {
  int64_t variant, vectors, rows, blocks;
};
Width width_for(int64_t vectors, bool whole, int64_t bits) {
  if (!whole) return {0, 1, 2, 1};
  return vectors > 1 ? Width{8, 8, 4, 1} : Width{1, 1, 4, 8 / bits};
}

uint32_t format_of_scales(const Tensor& scales) {
  return scales.scalar_type() == at::kFloat ? kFloat32 : scales.scalar_type() == at::kHalf ? kFloat16 : kBFloat16;
}

// Whether 32 bits hold the offset of every row, and a row's scale and bias have the same one.
bool has_small_offsets(const Packed& m) {
  const int64_t longest = std::max(m.weight.stride, 2 * m.scales.stride);
  return m.scales.stride == m.biases.stride && m.rows * longest <= std::numeric_limits<uint32_t>::max();
}

// The product with one vector on the matrix units.
void multiply_tiled(const Packed& m, const Tensor& x, const Tensor& bias, bool has_bias, const Tensor& result) {
  static KernelSet kernels("packed_tiles", "packed_tiles_linear");
  const TiledGrid grid = tiled_grid(m.rows, 16, m.cols, m.group_size);
  PackedProductParams p{};
  ProductParams& product = p.product;
  for (uint32_t& end : product.ends) end = kernel_size("quantized_linear", "rows of weight", m.rows);
  product.cols = kernel_size("quantized_linear", "columns of weight", m.cols);
  product.vectors = product.steps = product.kept = 1;
  product.splits = grid.splits;
  product.rounds = grid.rounds;
  product.flags = has_bias ? kBias : 0;
  product.scale = 1.0f;
  for (size_t i = 0; i < 3; ++i) {
    p.format.strides[i] = m.weight.stride;
    p.format.scale_strides[i] = m.scales.stride;
    p.format.bias_strides[i] = m.biases.stride;
  }
  p.format.group_size = static_cast<uint32_t>(m.group_size);
  p.format.one = kOne;
  const Tensor &w = m.weight.tensor, &s = m.scales.tensor, &b = m.biases.tensor;
  launch(kernels(x, grid.words), grid.threadgroups, grid.threads,
         {w, w, w, s, s, s, b, b, b, bias, bias, bias, x, x, result}, p);
}

}  // namespace

Tensor dequantize_gpu(const Tensor& weight, const Tensor& scales, const Tensor& biases, int64_t bits,
                      int64_t group_size, std::optional<at::ScalarType> dtype) {
  static KernelSet kernels("quantized", "quantized_unpack");
  const Packed m = check_packed("dequantize", weight, scales, biases, bits, group_size);
  const at::ScalarType result_dtype = dtype.value_or(scales.scalar_type());
  TORCH_CHECK(takes_dtype(result_dtype, scales), "dequantize: dtype", dtypes_taken(scales), result_dtype);
  std::vector<int64_t> sizes = weight.sizes().vec();
  sizes.back() = m.cols;
  const Tensor result = empty(sizes, scales.options().dtype(result_dtype));
  if (result.numel() == 0) return result;
  UnpackParams p{};
  p.weight_stride = m.weight.stride;
  p.scales_stride = m.scales.stride;
  p.biases_stride = m.biases.stride;
  p.cols = kernel_size("dequantize", "columns of weight", m.cols);
  p.group_size = static_cast<uint32_t>(group_size);
  p.scale_format = format_of_scales(scales);
  const int64_t each = kUnpackedColumns, threads = std::min(kThreads, (m.cols / each + 31) / 32 * 32);
  p.groups = static_cast<uint32_t>((m.cols + threads * each - 1) / (threads * each));
  p.aligned = rows_aligned(result, 0);
  launch(kernels(result, bits), m.rows * p.groups, threads, {m.weight.tensor, m.scales.tensor, m.biases.tensor, result},
         p);
  return result;
}

Tensor quantized_linear_gpu(const Tensor& x, const Tensor& weight, const Tensor& scales, const Tensor& biases,
                            const OptionalTensor& bias, int64_t bits, int64_t group_size) {
  static KernelSet four("quantized", "quantized_product_4"), eight("quantized", "quantized_product_8");
  const QuantizedCall call = check_quantized("quantized_linear", x, weight, scales, biases, bias, bits, group_size);
  if (!call.is_small()) return linear_unpacked(x, weight, scales, biases, bias, bits, group_size, dequantize_gpu);
  const Packed& m = call.matrix;
  const Rows vectors = as_rows(x, call.vectors, m.cols);
  const Tensor result = empty(call.result_sizes, x.options());
  QuantizedParams p{};
  p.weight_stride = m.weight.stride;
  p.scales_stride = m.scales.stride;
  p.biases_stride = m.biases.stride;
  p.x_stride = vectors.stride;
  p.rows = kernel_size("quantized_linear", "rows of weight", m.rows);
  p.cols = kernel_size("quantized_linear", "columns of weight", m.cols);
  p.group_size = static_cast<uint32_t>(group_size);
  p.vectors = static_cast<uint32_t>(call.vectors);
  p.scale_format = format_of_scales(scales);
  p.one = kOne;
  const Tensor row = bias ? bias->contiguous() : x;
  if (bias) p.flags |= kHasBias;
  const bool aligned = scales.scalar_type() == x.scalar_type() &&
                       rows_aligned(m.weight.tensor, m.rows > 1 ? m.weight.stride : 0) &&
                       rows_aligned(vectors.tensor, call.vectors > 1 ? vectors.stride : 0);
  if (aligned && call.vectors == 1 && is_tiled(scales, bits, m.rows)) {
    multiply_tiled(m, vectors.tensor, row, bias.has_value(), result);
    return result;
  }
  const Width width = width_for(call.vectors, aligned && has_small_offsets(m), bits);
  const int64_t steps = (m.cols + width.blocks * kPackedBlock - 1) / (width.blocks * kPackedBlock);
  p.splits = static_cast<uint32_t>(m.rows <= kFewRows ? std::clamp<int64_t>(steps, 1, kMostSplits) : 1);
  const int64_t simdgroups = (kPackedSimdgroups + p.splits - 1) / p.splits * p.splits;
  const int64_t rows = simdgroups / p.splits * width.rows;
  const int64_t groups = (m.rows + rows - 1) / rows * ((call.vectors + width.vectors - 1) / width.vectors);
  launch((bits == 4 ? four : eight)(x, width.variant), groups, 32 * simdgroups,
         {m.weight.tensor, m.scales.tensor, m.biases.tensor, vectors.tensor, row, result}, p);
  return result;
}

}  // namespace torch_fused
