// The loops over packed rows, compiled once for each instruction set, in a namespace of its own.
#pragma once

#include <type_traits>

#include "../../decode/step/formats.h"
#include "float_rows.h"
#include "integer_rows.h"

namespace torch_fused::TORCH_FUSED_TARGET {

// A scale or a bias.
TORCH_FUSED_INLINE float widen_one(float value) {
  return value;
}
TORCH_FUSED_INLINE float widen_one(c10::BFloat16 value) {
  return widen(value);
}
TORCH_FUSED_INLINE float widen_one(c10::Half value) {
#ifdef TORCH_FUSED_F16C
  return _cvtsh_ss(value.x);
#else
  return widen(value);
#endif
}

// kGroupsAtOnce groups of a row, or what is left, from groups.first on. `centre`: what the codes lack.
template <class S>
void load_groups(const PackedMatrix& m, const S* scales, int64_t row, float centre, PackedGroups& groups) {
  groups.count = std::min(m.groups - groups.first, kGroupsAtOnce);
  groups.codes = reinterpret_cast<const uint8_t*>(m.weight + row * m.stride) + groups.first * m.group_size * m.bits / 8;
  const S* from_scales = scales + row * m.scales_stride + groups.first;
  const S* from_biases = static_cast<const S*>(m.biases) + row * m.biases_stride + groups.first;
  for (int64_t i = 0; i < groups.count; ++i) {
    groups.scales[i] = widen_one(from_scales[i]);
    groups.biases[i] = widen_one(from_biases[i]) + centre * groups.scales[i];
  }
  for (int64_t i = groups.count; i % kLanes > 0; ++i) groups.biases[i] = 0;
}

constexpr int64_t kMostAtOnce = 64;  // vectors

// After the first few vectors the row comes from the nearest cache.
template <int bits, int blocks, class Vectors>
void add_all_products(const PackedMatrix& m, const PackedGroups& groups, const Vectors& x, float* results) {
  int64_t i = 0;
  for (; i + 4 <= x.count; i += 4) add_products<bits, blocks, 4>(m, groups, x, i, results + i);
  for (; i + 2 <= x.count; i += 2) add_products<bits, blocks, 2>(m, groups, x, i, results + i);
  if (i < x.count) add_products<bits, blocks, 1>(m, groups, x, i, results + i);
}

template <int bits, int blocks, class Vectors>
void multiply_rows(const PackedMatrix& m, const Vectors& x, int64_t begin, int64_t end, float* results, int64_t n) {
  constexpr bool floats = std::is_same_v<Vectors, FloatVectors>;
  for (int64_t row = begin; row < end; ++row) {
    float products[kMostAtOnce] = {};
    const auto for_groups = [&](auto function) {
      PackedGroups groups;
      for (groups.first = 0; groups.first < m.groups; groups.first += kGroupsAtOnce) {
        with_format(m.format, m.scales, [&](const auto* scales) __attribute__((always_inline)) {
          load_groups(m, scales, row, floats ? 0 : kCentre<bits>, groups);
        });
        function(groups);
      }
    };
    for_groups([&](const PackedGroups& groups) { add_all_products<bits, blocks>(m, groups, x, products); });
    for (int64_t i = 0; i < x.count; ++i) {
      if constexpr (floats) {
        if (!std::isfinite(products[i])) {
          products[i] = 0;
          for_groups([&](const PackedGroups& groups) { add_exact_product(m, groups, x, i, products[i]); });
        }
      }
      results[i * n + row] = products[i];
    }
  }
}

template <int bits, class Vectors>
void multiply_any(const PackedMatrix& m, const Vectors& x, int64_t begin, int64_t end, float* results, int64_t n) {
  switch (m.group_size / kCodeBlock) {
    case 1:
      return multiply_rows<bits, 1>(m, x, begin, end, results, n);
    case 2:
      return multiply_rows<bits, 2>(m, x, begin, end, results, n);
    default:
      return multiply_rows<bits, 4>(m, x, begin, end, results, n);
  }
}

void arrange(const PackedMatrix& m, const float* x, float* values, float* sums) {
  arrange_floats(m, x, values, sums);
}
void arrange(const PackedMatrix& m, const float* x, int8_t* codes, float* scales, float* sums) {
  arrange_integers(m, x, codes, scales, sums);
}
void multiply(const PackedMatrix& m, const FloatVectors& x, int64_t begin, int64_t end, float* results, int64_t n) {
  m.bits == 4 ? multiply_any<4>(m, x, begin, end, results, n) : multiply_any<8>(m, x, begin, end, results, n);
}
void multiply(const PackedMatrix& m, const IntegerVectors& x, int64_t begin, int64_t end, float* results, int64_t n) {
  m.bits == 4 ? multiply_any<4>(m, x, begin, end, results, n) : multiply_any<8>(m, x, begin, end, results, n);
}

}  // namespace torch_fused::TORCH_FUSED_TARGET
