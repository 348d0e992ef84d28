// The loops over packed rows, compiled once for each instruction set, in a namespace of its own.
#pragma once

#include <type_traits>

#include "../../decode/step/formats.h"
#include "float_rows.h"
#include "integer_rows.h"

namespace torch_fused::TORCH_FUSED_TARGET {

// Products of one row with all vectors; after the first few the row comes from the nearest cache.
template <int bits, class S, class Vectors>
TORCH_FUSED_INLINE void packed_products(const PackedRow<S>& row, const Vectors& x, float* results) {
  int64_t i = 0;
  for (; i + 4 <= x.count; i += 4) packed_products<bits, 4>(row, x, i, results + i);
  switch (x.count - i) {
    case 3:
      return packed_products<bits, 3>(row, x, i, results + i);
    case 2:
      return packed_products<bits, 2>(row, x, i, results + i);
    case 1:
      return packed_products<bits, 1>(row, x, i, results + i);
  }
}

constexpr int64_t kMostAtOnce = 64;  // vectors

template <int bits, class S, class Vectors>
void multiply_rows(const PackedMatrix& m, const Vectors& x, int64_t begin, int64_t end, float* results, int64_t n) {
  for (int64_t index = begin; index < end; ++index) {
    const PackedRow<S> row{reinterpret_cast<const uint8_t*>(m.weight + index * m.stride),
                           static_cast<const S*>(m.scales) + index * m.scales_stride,
                           static_cast<const S*>(m.biases) + index * m.biases_stride, m.cols / m.group_size,
                           m.group_size / kCodeBlock};
    float products[kMostAtOnce];
    packed_products<bits>(row, x, products);
    for (int64_t i = 0; i < x.count; ++i) {
      if constexpr (std::is_same_v<Vectors, FloatVectors>) {
        if (!std::isfinite(products[i])) products[i] = exact_product<bits>(row, x, i);
      }
      results[i * n + index] = products[i];
    }
  }
}

template <class Vectors>
TORCH_FUSED_INLINE void multiply_any(const PackedMatrix& m, const Vectors& x, int64_t begin, int64_t end,
                                     float* results, int64_t n) {
  with_format(m.format, m.scales, [&](const auto* scales) __attribute__((always_inline)) {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(scales)>>;
    m.bits == 4 ? multiply_rows<4, S>(m, x, begin, end, results, n)
                : multiply_rows<8, S>(m, x, begin, end, results, n);
  });
}

void arrange(const float* x, int64_t cols, int64_t bits, float* values, float* sums) {
  arrange_floats(x, cols, bits, values, sums);
}
void arrange(const float* x, int64_t cols, int64_t bits, int8_t* codes, float* scales, float* sums) {
  arrange_integers(x, cols, bits, codes, scales, sums);
}
void multiply(const PackedMatrix& m, const FloatVectors& x, int64_t begin, int64_t end, float* results, int64_t n) {
  multiply_any(m, x, begin, end, results, n);
}
void multiply(const PackedMatrix& m, const IntegerVectors& x, int64_t begin, int64_t end, float* results, int64_t n) {
  multiply_any(m, x, begin, end, results, n);
}

}  // namespace torch_fused::TORCH_FUSED_TARGET
