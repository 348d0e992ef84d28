// The loops over packed rows, compiled once per instruction set, in separate namespaces.
#pragma once

#include <type_traits>

#include "../../decode/step/formats.h"
#include "float_rows.h"
#include "integer_rows.h"

namespace torch_fused::TORCH_FUSED_TARGET {

// Groups of a row, kGroupsAtOnce or fewer, from groups.first on.
template <class S>
TORCH_FUSED_INLINE void load_groups(const PackedMatrix& m, const S* scales, int64_t row, PackedGroups& groups) {
  groups.count = std::min(m.groups - groups.first, kGroupsAtOnce);
  groups.codes = reinterpret_cast<const uint8_t*>(m.weight + row * m.stride) + groups.first * m.group_size * m.bits / 8;
  for (int64_t i = 0; i < groups.count; i += kLanes) {
    const int64_t group = groups.first + i, count = groups.count - i;
    const bool beyond = m.has_memory(row, group + kLanes);
    const auto* biases = static_cast<const S*>(m.biases) + row * m.biases_stride + group;
    Lanes some;
    load_first(scales + row * m.scales_stride + group, count, beyond, some);
    store(some, groups.scales + i);
    load_first(biases, count, beyond, some);
    store(some, groups.biases + i);
  }
}

// Calls function(number of vectors, first vector) for all of them: after the first few the row comes from the nearest
// cache.
template <class Function>
TORCH_FUSED_INLINE void for_vectors(int64_t count, Function function) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) function(std::integral_constant<int, 4>(), i);
  for (; i + 2 <= count; i += 2) function(std::integral_constant<int, 2>(), i);
  if (i < count) function(std::integral_constant<int, 1>(), i);
}

// R rows from `row` on with all vectors, or with the only one if R > 1.
template <int bits, int group_size, int R>
TORCH_FUSED_INLINE void multiply_together(const PackedMatrix& m, const IntegerVectors& x, int64_t row, float* results,
                                          int64_t n) {
  if constexpr (R > 1) {
    integer_products<bits, group_size, R, 1>(m, x, row, 0, results, n);
  } else {
    for_vectors(x.count, [&](auto count, int64_t i) __attribute__((always_inline)) {
      integer_products<bits, group_size, 1, count>(m, x, row, i, results, n);
    });
  }
}

template <int bits, int group_size, int R>
void multiply_together(const PackedMatrix& m, const FloatVectors& x, int64_t row, float* results, int64_t n) {
  Products products[R] = {};
  const auto for_groups = [&](auto function) {
    PackedGroups rows[R];
    for (int64_t first = 0; first < m.groups; first += kGroupsAtOnce) {
      with_format(m.format, m.scales, [&](const auto* scales) __attribute__((always_inline)) {
        for (int r = 0; r < R; ++r) {
          rows[r].first = first;
          load_groups(m, scales, row + r, rows[r]);
        }
      });
      function(rows);
    }
  };
  for_groups([&](const PackedGroups(&rows)[R]) {
    if constexpr (R > 1) {
      add_products<bits, group_size, 1>(m, rows, x, 0, products);
    } else {
      for_vectors(x.count, [&](auto count, int64_t i) __attribute__((always_inline)) {
        add_products<bits, group_size, count>(m, rows, x, i, products);
      });
    }
  });
  for (int r = 0; r < R; ++r) {
    for (int64_t i = 0; i < x.count; ++i) {
      if (!std::isfinite(products[r][i])) {
        products[r][i] = 0;
        for_groups([&](const PackedGroups(&rows)[R]) { add_exact_product(m, rows[r], x, i, products[r][i]); });
      }
      results[i * n + r] = products[r][i];
    }
  }
}

template <int bits, int group_size, class Vectors>
void multiply_rows(const PackedMatrix& m, const Vectors& x, int64_t begin, int64_t end, float* results, int64_t n) {
  constexpr int kRows = kWide == 16 ? 8 : 4;  // whose sums fit into the registers
  int64_t row = begin;
  for (; x.count == 1 && row + kRows <= end; row += kRows) {
    multiply_together<bits, group_size, kRows>(m, x, row, results + row - begin, n);
  }
  for (; row < end; ++row) multiply_together<bits, group_size, 1>(m, x, row, results + row - begin, n);
}

template <int bits, class Vectors>
void multiply_any(const PackedMatrix& m, const Vectors& x, int64_t begin, int64_t end, float* results, int64_t n) {
  switch (m.group_size) {
    case 32:
      return multiply_rows<bits, 32>(m, x, begin, end, results, n);
    case 64:
      return multiply_rows<bits, 64>(m, x, begin, end, results, n);
    default:
      return multiply_rows<bits, 128>(m, x, begin, end, results, n);
  }
}

void arrange(const PackedMatrix& m, const float* x, float* values, float* sums) {
  arrange_floats(m, x, values, sums);
}
void arrange(const PackedMatrix& m, const float* x, int8_t* codes, float* scales, float* sums) {
  m.bits == 4 ? arrange_integers<4>(m, x, codes, scales, sums) : arrange_integers<8>(m, x, codes, scales, sums);
}
void multiply(const PackedMatrix& m, const FloatVectors& x, int64_t begin, int64_t end, float* results, int64_t n) {
  m.bits == 4 ? multiply_any<4>(m, x, begin, end, results, n) : multiply_any<8>(m, x, begin, end, results, n);
}
void multiply(const PackedMatrix& m, const IntegerVectors& x, int64_t begin, int64_t end, float* results, int64_t n) {
  m.bits == 4 ? multiply_any<4>(m, x, begin, end, results, n) : multiply_any<8>(m, x, begin, end, results, n);
}

}  // namespace torch_fused::TORCH_FUSED_TARGET
