// Shared by quantized.cpp (CPU) and quantized_launch.cpp (GPU): the kernels' signatures and the checked call.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../common/rows.h"

namespace torch_fused {

constexpr int64_t kMostPackedVectors = 8;  // with more, a matrix is unpacked for torch's product

// A packed matrix as rows, of any leading dimensions.
struct Packed {
  int64_t rows, cols, bits, group_size;
  Rows weight, scales, biases;  // 32-bit words; a scale and a bias per group
};

Packed check_packed(const char* op, const at::Tensor& weight, const at::Tensor& scales, const at::Tensor& biases,
                    int64_t bits, int64_t group_size);

// A product with a packed matrix: x is (vectors, cols).
struct QuantizedCall {
  Packed matrix;
  int64_t vectors;
  std::vector<int64_t> result_sizes;

  // Whether the packed rows are multiplied directly.
  bool is_small() const { return vectors <= kMostPackedVectors && vectors > 0 && matrix.rows > 0 && matrix.cols > 0; }
};

QuantizedCall check_quantized(const char* op, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scales,
                              const at::Tensor& biases, const std::optional<at::Tensor>& bias, int64_t bits,
                              int64_t group_size);

// The matrix in `dtype`, or the scales'.
using DequantizeSignature = at::Tensor(const at::Tensor& weight, const at::Tensor& scales, const at::Tensor& biases,
                                       int64_t bits, int64_t group_size, std::optional<at::ScalarType> dtype);
DequantizeSignature dequantize_cpu, dequantize_gpu;

// x times the matrix, transposed, plus bias.
using QuantizedLinearSignature = at::Tensor(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scales,
                                            const at::Tensor& biases, const std::optional<at::Tensor>& bias,
                                            int64_t bits, int64_t group_size);
QuantizedLinearSignature quantized_linear_cpu, quantized_linear_gpu;

// The same by `unpack`, dequantize_cpu or dequantize_gpu, and torch's product.
at::Tensor linear_unpacked(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scales,
                           const at::Tensor& biases, const std::optional<at::Tensor>& bias, int64_t bits,
                           int64_t group_size, decltype(&dequantize_cpu) unpack);

}  // namespace torch_fused
