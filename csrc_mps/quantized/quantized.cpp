// Packed matrices: schema, checks, autograd, autocast and the CPU kernels. cpu/ has the loops over packed rows.
#include "quantized.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <string>
#include <tuple>

#include "../common/autograd.h"
#include "../common/checks.h"
#include "../common/convert.h"
#include "../common/registration.h"
#include "../common/simd.h"
#include "../common/torch_functions.h"
#include "cpu/ready_vectors.h"

TORCH_LIBRARY_FRAGMENT(torch_fused, m) {
  m.def(
      "dequantize(Tensor weight, Tensor scales, Tensor biases, *, int bits, int group_size, ScalarType? dtype=None) "
      "-> Tensor");
  m.def(
      "quantized_linear(Tensor x, Tensor weight, Tensor scales, Tensor biases, Tensor? bias=None, *, int bits, "
      "int group_size) -> Tensor");
  // For the tests: quantized_linear on the CPU, with x rounded to int8 as in the decode step.
  m.def(
      "_quantized_linear_int8(Tensor x, Tensor weight, Tensor scales, Tensor biases, *, int bits, int group_size) "
      "-> Tensor");
}

namespace torch_fused {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- checks ---------------------------------------------------------------------------------------------------------

Packed check_packed(const char* op, const Tensor& weight, const Tensor& scales, const Tensor& biases, int64_t bits,
                    int64_t group_size) {
  TORCH_CHECK(bits == 4 || bits == 8, op, ": bits must be 4 or 8, got ", bits);
  TORCH_CHECK(group_size == 32 || group_size == 64 || group_size == 128, op, ": group_size must be 32, 64 or 128, got ",
              group_size);
  TORCH_CHECK(weight.scalar_type() == at::kUInt32 && weight.dim() >= 1, op,
              ": weight must be a uint32 tensor of packed rows, got ", weight.scalar_type(), " of shape ",
              weight.sizes());
  const int64_t words = weight.size(-1), in_group = group_size * bits / 32;
  TORCH_CHECK(words % in_group == 0 && words <= std::numeric_limits<int64_t>::max() / 32, op,
              ": weight must have rows of whole groups, a multiple of ", in_group, " words, got shape ",
              weight.sizes());
  std::vector<int64_t> sizes = weight.sizes().vec();
  sizes.back() = words / in_group;
  TORCH_CHECK(
      scales.scalar_type() == at::kFloat || scales.scalar_type() == at::kHalf || scales.scalar_type() == at::kBFloat16,
      op, ": scales must be float32, float16 or bfloat16, got ", scales.scalar_type());
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"scales", scales}, {"biases", biases}}) {
    TORCH_CHECK(tensor.sizes() == at::IntArrayRef(sizes), op, ": ", name, " must have the shape ",
                at::IntArrayRef(sizes), ", one for each group of weight, got ", tensor.sizes());
    check_alike(op, name, tensor, "scales", scales);
    TORCH_CHECK(tensor.device() == weight.device(), op, ": ", name, " must be on weight's device ", weight.device(),
                ", got ", tensor.device());
  }
  const int64_t cols = words * 32 / bits, rows = words == 0 ? 0 : weight.numel() / words;
  return {rows,
          cols,
          bits,
          group_size,
          as_rows(weight, rows, words),
          as_rows(scales, rows, sizes.back()),
          as_rows(biases, rows, sizes.back())};
}

QuantizedCall check_quantized(const char* op, const Tensor& x, const Tensor& weight, const Tensor& scales,
                              const Tensor& biases, const OptionalTensor& bias, int64_t bits, int64_t group_size) {
  check_dtype(op, "x", x);
  TORCH_CHECK(weight.dim() == 2, op, ": weight must have two dimensions, got shape ", weight.sizes());
  QuantizedCall call{check_packed(op, weight, scales, biases, bits, group_size), 0, {}};
  TORCH_CHECK(x.device() == weight.device(), op, ": x must be on weight's device ", weight.device(), ", got ",
              x.device());
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == call.matrix.cols, op, ": x must have weight's ", call.matrix.cols,
              " columns as its last dimension, got shape ", x.sizes());
  if (bias) {
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0), op, ": bias must have the shape [", weight.size(0),
                "], got ", bias->sizes());
    check_alike(op, "bias", *bias, "x", x);
  }
  call.result_sizes = x.sizes().vec();
  call.result_sizes.back() = weight.size(0);
  call.vectors = call.matrix.cols == 0 ? 0 : x.numel() / call.matrix.cols;
  return call;
}

// ---- unpacking ------------------------------------------------------------------------------------------------------

namespace {

constexpr int64_t kUnpackedAtOnce = int64_t(1) << 26;  // weights: a head would take more memory than the whole model

uint32_t format_of_scales(const Tensor& scales) {
  return scales.scalar_type() == at::kFloat ? kFloat32 : scales.scalar_type() == at::kHalf ? kFloat16 : kBFloat16;
}

template <int bits, class T, class Wide>
TORCH_FUSED_INLINE void unpack_group(const uint32_t* words, int64_t count, Wide scale, Wide bias, T* to) {
  constexpr int64_t kEach = 32 / bits;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < kEach; ++j) {
      const auto code = static_cast<int32_t>(words[i] >> (bits * j) & ((1u << bits) - 1));
      to[i * kEach + j] = narrow<T>(scale * static_cast<Wide>(code) + bias);
    }
  }
}

#define QUANTIZED_UNPACK(T)                                                                                         \
  TORCH_FUSED_SIMD void unpack(const uint32_t* words, int64_t count, int64_t bits, wide_t<T> scale, wide_t<T> bias, \
                               T* to) {                                                                             \
    bits == 4 ? unpack_group<4>(words, count, scale, bias, to) : unpack_group<8>(words, count, scale, bias, to);    \
  }
QUANTIZED_UNPACK(float)
QUANTIZED_UNPACK(double)
QUANTIZED_UNPACK(at::Half)
QUANTIZED_UNPACK(at::BFloat16)

template <class T, class S>
void unpack_rows(const Packed& m, T* to) {
  const int64_t words = m.group_size * m.bits / 32, groups = m.cols / m.group_size;
  const auto* weight = elements<const uint32_t>(m.weight.tensor);
  const S *scales = elements<const S>(m.scales.tensor), *biases = elements<const S>(m.biases.tensor);
  at::parallel_for(0, m.rows, row_grain(m.cols), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t g = 0; g < groups; ++g) {
        unpack(weight + row * m.weight.stride + g * words, words, m.bits, widen(scales[row * m.scales.stride + g]),
               widen(biases[row * m.biases.stride + g]), to + row * m.cols + g * m.group_size);
      }
    }
  });
}

std::vector<int64_t> unpacked_sizes(const Tensor& weight, int64_t cols) {
  std::vector<int64_t> sizes = weight.sizes().vec();
  sizes.back() = cols;
  return sizes;
}

}  // namespace

Tensor dequantize_cpu(const Tensor& weight, const Tensor& scales, const Tensor& biases, int64_t bits,
                      int64_t group_size, std::optional<at::ScalarType> dtype) {
  const Packed m = check_packed("dequantize", weight, scales, biases, bits, group_size);
  const at::ScalarType result_dtype = dtype.value_or(scales.scalar_type());
  TORCH_CHECK(takes_dtype(result_dtype, scales), "dequantize: dtype", dtypes_taken(scales), result_dtype);
  const Tensor result = empty(unpacked_sizes(weight, m.cols), scales.options().dtype(result_dtype));
  if (result.numel() == 0) return result;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, result_dtype, "dequantize", [&] {
    using T = scalar_t;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, scales.scalar_type(), "dequantize",
                                    [&] { unpack_rows<T, scalar_t>(m, elements<T>(result)); });
  });
  return result;
}

Tensor linear_unpacked(const Tensor& x, const Tensor& weight, const Tensor& scales, const Tensor& biases,
                       const OptionalTensor& bias, int64_t bits, int64_t group_size, decltype(&dequantize_cpu) unpack) {
  const int64_t rows = weight.size(0), block = std::max<int64_t>(1, kUnpackedAtOnce / std::max<int64_t>(1, x.size(-1)));
  if (rows <= block) return at::linear(x, unpack(weight, scales, biases, bits, group_size, x.scalar_type()), bias);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = rows;
  const Tensor result = empty(sizes, x.options());
  for (int64_t first = 0; first < rows; first += block) {
    const int64_t count = std::min(block, rows - first);
    const auto part = [&](const Tensor& tensor) { return tensor.narrow(0, first, count); };
    const Tensor matrix = unpack(part(weight), part(scales), part(biases), bits, group_size, x.scalar_type());
    result.narrow(-1, first, count).copy_(at::linear(x, matrix, bias ? OptionalTensor(part(*bias)) : bias));
  }
  return result;
}

// ---- packed rows on the CPU -----------------------------------------------------------------------------------------

namespace {

PackedMatrix as_loops_see(const Packed& m) {
  return {elements<const uint32_t>(m.weight.tensor),
          m.scales.tensor.const_data_ptr(),
          m.biases.tensor.const_data_ptr(),
          format_of_scales(m.scales.tensor),
          m.cols,
          m.bits,
          m.group_size,
          m.weight.stride,
          m.scales.stride,
          m.biases.stride,
          m.rows};
}

// Products of up to kMostPackedVectors vectors, in float32: (vectors, rows).
Tensor multiply_packed(const QuantizedCall& call, const Tensor& x, bool integers) {
  const int64_t rows = call.matrix.rows;
  const PackedMatrix m = as_loops_see(call.matrix);
  const Tensor wide = x.to(at::kFloat).reshape({call.vectors, m.cols}).contiguous();
  const Tensor results = empty({call.vectors, rows}, wide.options());
  float* to = elements<float>(results);
  const std::unique_ptr<float[]> memory(new float[static_cast<size_t>(ReadyVectors::size(m.cols, call.vectors))]);
  ReadyVectors vectors;
  vectors.prepare(m, elements<const float>(wide), call.vectors, integers, memory.get());
  at::parallel_for(0, rows, 4 * row_grain(m.cols),
                   [&](int64_t begin, int64_t end) { vectors.multiply(m, begin, end, to + begin, rows); });
  return results;
}

}  // namespace

Tensor quantized_linear_cpu(const Tensor& x, const Tensor& weight, const Tensor& scales, const Tensor& biases,
                            const OptionalTensor& bias, int64_t bits, int64_t group_size) {
  const QuantizedCall call = check_quantized("quantized_linear", x, weight, scales, biases, bias, bits, group_size);
  if (!call.is_small() || x.scalar_type() == at::kDouble) {
    return linear_unpacked(x, weight, scales, biases, bias, bits, group_size, dequantize_cpu);
  }
  Tensor result = multiply_packed(call, x, false);
  if (bias) result += *bias;
  return result.reshape(call.result_sizes).to(x.scalar_type());
}

namespace {

Tensor quantized_linear_int8(const Tensor& x, const Tensor& weight, const Tensor& scales, const Tensor& biases,
                             int64_t bits, int64_t group_size) {
  const char* op = "_quantized_linear_int8";
  const QuantizedCall call = check_quantized(op, x, weight, scales, biases, std::nullopt, bits, group_size);
  TORCH_CHECK(call.is_small(), op, ": x must have 1 to ", kMostPackedVectors, " vectors, got shape ", x.sizes());
  return multiply_packed(call, x, true).reshape(call.result_sizes).to(x.scalar_type());
}

// ---- autograd and autocast ------------------------------------------------------------------------------------------

void check_no_gradient(const char* op, const Tensor& scales, const Tensor& biases) {
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"scales", scales}, {"biases", biases}}) {
    TORCH_CHECK(!needs_gradient(tensor) && !has_tangent(tensor), op, ": ", name,
                " is differentiated, but a packed matrix has no gradient: pass ", name, ".detach()");
  }
}

Tensor call_dequantize(const Tensor& weight, const Tensor& scales, const Tensor& biases, int64_t bits,
                       int64_t group_size, std::optional<at::ScalarType> dtype) {
  static const auto op = find_op<decltype(dequantize_cpu)>("torch_fused::dequantize");
  return op.call(weight, scales, biases, bits, group_size, dtype);
}

Tensor dequantize_autograd(const Tensor& weight, const Tensor& scales, const Tensor& biases, int64_t bits,
                           int64_t group_size, std::optional<at::ScalarType> dtype) {
  check_no_gradient("dequantize", scales, biases);
  at::AutoDispatchBelowADInplaceOrView below;
  return call_dequantize(weight, scales, biases, bits, group_size, dtype);
}

Tensor call_quantized_linear(const Tensor& x, const Tensor& weight, const Tensor& scales, const Tensor& biases,
                             const OptionalTensor& bias, int64_t bits, int64_t group_size) {
  static const auto op = find_op<decltype(quantized_linear_cpu)>("torch_fused::quantized_linear");
  return op.call(x, weight, scales, biases, bias, bits, group_size);
}

struct QuantizedLinearFunction : torch::autograd::Function<QuantizedLinearFunction> {
  static constexpr char op[] = "quantized_linear";

  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const Tensor& scales, const Tensor& biases, const OptionalTensor& bias, int64_t bits,
                        int64_t group_size) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({weight, scales, biases});
    ctx->saved_data["bits"] = bits;
    ctx->saved_data["group_size"] = group_size;
    ctx->saved_data["x"] = x.requires_grad();
    ctx->saved_data["bias"] = bias && bias->requires_grad();
    return call_quantized_linear(x, weight, scales, biases, bias, bits, group_size);
  }

  // In torch's ops, so that it can be differentiated again.
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const Tensor& grad = grads[0];
    Tensor grad_x, grad_bias;
    if (ctx->saved_data["x"].toBool()) {
      const auto saved = ctx->get_saved_variables();
      const Tensor matrix = call_dequantize(saved[0], saved[1], saved[2], ctx->saved_data["bits"].toInt(),
                                            ctx->saved_data["group_size"].toInt(), grad.scalar_type());
      grad_x = at::matmul(grad, matrix);
    }
    if (ctx->saved_data["bias"].toBool()) {
      std::vector<int64_t> leading(static_cast<size_t>(grad.dim() - 1));
      for (size_t i = 0; i < leading.size(); ++i) leading[i] = static_cast<int64_t>(i);
      grad_bias = leading.empty() ? grad : grad.sum(leading);
    }
    return {grad_x, Tensor(), Tensor(), Tensor(), grad_bias, Tensor(), Tensor()};
  }
};

Tensor quantized_linear_autograd(const Tensor& x, const Tensor& weight, const Tensor& scales, const Tensor& biases,
                                 const OptionalTensor& bias, int64_t bits, int64_t group_size) {
  check_no_gradient("quantized_linear", scales, biases);
  return Differentiable<QuantizedLinearFunction, decltype(quantized_linear_cpu)>::call(x, weight, scales, biases, bias,
                                                                                       bits, group_size);
}

// Like torch's own linear: in autocast's dtype.
template <c10::DispatchKey key, c10::DeviceType device>
Tensor quantized_linear_autocast(const Tensor& x, const Tensor& weight, const Tensor& scales, const Tensor& biases,
                                 const OptionalTensor& bias, int64_t bits, int64_t group_size) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const auto cast = [](const Tensor& tensor) { return autocast_to(autocast_dtype(device), tensor, device); };
  return call_quantized_linear(cast(x), weight, scales, biases, bias ? OptionalTensor(cast(*bias)) : bias, bits,
                               group_size);
}

}  // namespace
}  // namespace torch_fused

TORCH_LIBRARY_IMPL(torch_fused, CPU, m) {
  m.impl("_quantized_linear_int8", torch_fused::quantized_linear_int8);
}
TORCH_LIBRARY_IMPL(torch_fused, Autograd, m) {
  m.impl("dequantize", torch_fused::dequantize_autograd);
  m.impl("quantized_linear", torch_fused::quantized_linear_autograd);
}
#define TORCH_FUSED_AUTOCAST(key, device)                                                           \
  TORCH_LIBRARY_IMPL(torch_fused, key, m) {                                                         \
    m.impl("quantized_linear",                                                                      \
           torch_fused::quantized_linear_autocast<c10::DispatchKey::key, c10::DeviceType::device>); \
  }
TORCH_FUSED_AUTOCAST(AutocastCPU, CPU)
TORCH_FUSED_AUTOCAST(AutocastCUDA, CUDA)
TORCH_FUSED_AUTOCAST(AutocastMPS, MPS)
TORCH_FUSED_KERNELS(dequantize)
TORCH_FUSED_KERNELS(quantized_linear)
