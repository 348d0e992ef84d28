// A packed matrix as the CPU's loops see it, and vectors made ready for its rows.
#pragma once

#include <cstdint>
#include <vector>

#include "../../common/simd.h"
#include "../../decode/decode_params.h"

namespace torch_fused {

// Columns whose codes a loop takes at once. Vectors are laid out as the codes come: of four bits, the even columns of a
// block and then the odd ones; of eight, in order.
constexpr int64_t kCodeBlock = 32;

struct PackedMatrix {
  const uint32_t* weight;
  const void* scales;
  const void* biases;
  uint32_t format;  // of the scales and the biases
  int64_t cols, bits, group_size;
  int64_t stride, scales_stride, biases_stride;  // words, or elements, from row to row

  int64_t blocks() const { return cols / kCodeBlock; }
};

// Vectors of floats.
struct FloatVectors {
  const float* values;  // (count, cols)
  const float* sums;    // (count, blocks): of each block
  int64_t count;
};

// Vectors of int8 with a scale a block, for integer products.
struct IntegerVectors {
  const int8_t* codes;  // (count, cols)
  const float* scales;  // (count, blocks)
  const float* sums;    // (count, blocks): of each block's codes, times its scale
  int64_t count;
};

// For each instruction set: makes a vector ready for rows of `bits`, and multiplies rows begin .. end - 1 with vectors;
// result `row` of vector i goes to results[i * stride + row].
#define TORCH_FUSED_DECLARE_PACKED(target)                                                                             \
  namespace target {                                                                                                   \
  void arrange(const float* x, int64_t cols, int64_t bits, float* values, float* sums);                                \
  void arrange(const float* x, int64_t cols, int64_t bits, int8_t* codes, float* scales, float* sums);                 \
  void multiply(const PackedMatrix& m, const FloatVectors& x, int64_t begin, int64_t end, float* results, int64_t n);   \
  void multiply(const PackedMatrix& m, const IntegerVectors& x, int64_t begin, int64_t end, float* results, int64_t n); \
  }
TORCH_FUSED_DECLARE_PACKED(baseline)
#ifdef TORCH_FUSED_X86_DISPATCH
TORCH_FUSED_DECLARE_PACKED(avx2)
TORCH_FUSED_DECLARE_PACKED(avx512)
TORCH_FUSED_DECLARE_PACKED(vnni)
#endif

}  // namespace torch_fused
