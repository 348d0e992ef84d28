// A packed matrix as the CPU's loops see it, and vectors made ready for its rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../../common/simd.h"
#include "../../decode/decode_params.h"

namespace torch_fused {

// Vectors are laid out as the codes come. Of four bits, floats have the even columns of a block and then the odd ones,
// integers the even columns of a register of codes, then the odd ones. Of eight bits, all are in order.
constexpr int64_t kCodeBlock = 32;
constexpr int64_t kScaled = 8;  // columns of a vector of integers that share a scale

struct PackedMatrix {
  const uint32_t* weight;
  const void* scales;
  const void* biases;
  uint32_t format;  // of the scales and the biases
  int64_t cols = 0, bits = 0, group_size = 1;
  int64_t stride, scales_stride, biases_stride;  // words, or elements, from row to row
  int64_t rows = 0;

  // Of a row; a division would take as long as much of a short row's product.
  int64_t groups = cols / group_size;
  int64_t blocks = cols / kCodeBlock;
  int64_t sums = (groups + 15) / 16 * 16;     // of a vector: one a group, then zeros
  int64_t padded = (cols + 127) / 128 * 128;  // columns of a vector of integers, to the end of any machine's register

  // Scales of a vector of integers: one for each word of codes.
  int64_t vector_scales() const { return padded * bits / 32; }

  // Whether the scales and biases from this row's first up to the end of `group` - 1 can be read.
  bool has_memory(int64_t row, int64_t group) const {
    return (rows - 1 - row) * std::min(scales_stride, biases_stride) + groups >= group;
  }
};

// Vectors of floats.
struct FloatVectors {
  const float* values;  // (count, cols)
  const float* sums;    // (count, sums): of each group
  int64_t count;
};

// Vectors of int8 with their scales, for integer products.
struct IntegerVectors {
  const int8_t* codes;  // (count, padded), with zeros after the columns
  const float* scales;  // (count, vector_scales)
  const float* sums;    // (count, sums): of each group's codes times their scales
  int64_t count;
};

// For each instruction set: makes a vector ready for the rows of a matrix, and multiplies rows begin .. end - 1 with
// vectors; the result of row begin + r and vector i goes to results[i * n + r].
#define TORCH_FUSED_DECLARE_PACKED(target)                                                                            \
  namespace target {                                                                                                  \
  void arrange(const PackedMatrix& m, const float* x, float* values, float* sums);                                    \
  void arrange(const PackedMatrix& m, const float* x, int8_t* codes, float* scales, float* sums);                     \
  void multiply(const PackedMatrix& m, const FloatVectors& x, int64_t begin, int64_t end, float* results, int64_t n); \
  void multiply(const PackedMatrix& m, const IntegerVectors& x, int64_t begin, int64_t end, float* results,           \
                int64_t n);                                                                                           \
  }
TORCH_FUSED_DECLARE_PACKED(baseline)
#ifdef TORCH_FUSED_X86_DISPATCH
TORCH_FUSED_DECLARE_PACKED(avx2)
TORCH_FUSED_DECLARE_PACKED(vnni)
#endif

}  // namespace torch_fused
