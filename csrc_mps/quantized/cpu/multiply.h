// The loops over packed rows, compiled once per instruction set, in separate namespaces.
#pragma once

#include <type_traits>

#include "../../decode/step/formats.h"
#include "float_rows.h"
#include "integer_rows.h"

namespace torch_fused::TORCH_FUSED_TARGET {

// `count` scales or biases, and zeros to the end of a register. `beyond`: the memory after them may be read.
template <class S>
TORCH_FUSED_INLINE void load_some(const S* from, int64_t count, bool beyond, float* to) {
  static constexpr uint32_t kIndex[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int64_t i = 0; i < count; i += kLanes) {
    Lanes values;
    if (beyond || i + kLanes <= count) {
      load(from + i, values);
    } else {
      S last[kLanes] = {};
      std::copy(from + i, from + count, last);
      load(last, values);
    }
    LaneBits bits, index;
    std::memcpy(&index, kIndex, sizeof(index));
    std::memcpy(&bits, &values, sizeof(bits));
    bits &= (LaneBits)(index < static_cast<uint32_t>(count - i));
    std::memcpy(to + i, &bits, sizeof(bits));
  }
}

// Groups of a row, kGroupsAtOnce or fewer, from groups.first on. `centre`: what was subtracted from the codes.
template <class S>
TORCH_FUSED_INLINE void load_groups(const PackedMatrix& m, const S* scales, int64_t row, float centre,
                                    PackedGroups& groups) {
  groups.count = std::min(m.groups - groups.first, kGroupsAtOnce);
  groups.codes = reinterpret_cast<const uint8_t*>(m.weight + row * m.stride) + groups.first * m.group_size * m.bits / 8;
  // There is memory up to the last row's last group.
  const int64_t left = (m.rows - 1 - row) * std::min(m.scales_stride, m.biases_stride) + m.groups - groups.first;
  const bool beyond = left >= groups.count + kLanes;
  load_some(scales + row * m.scales_stride + groups.first, groups.count, beyond, groups.scales);
  load_some(static_cast<const S*>(m.biases) + row * m.biases_stride + groups.first, groups.count, beyond,
            groups.biases);
  for (int64_t i = 0; i < groups.count && centre != 0; ++i) groups.biases[i] += centre * groups.scales[i];
}

// After the first few vectors the row comes from the nearest cache.
template <int bits, int blocks, class Vectors>
void add_all_products(const PackedMatrix& m, const PackedGroups (&row)[1], const Vectors& x, Products* results) {
  int64_t i = 0;
  for (; i + 4 <= x.count; i += 4) add_products<bits, blocks, 4>(m, row, x, i, results);
  for (; i + 2 <= x.count; i += 2) add_products<bits, blocks, 2>(m, row, x, i, results);
  if (i < x.count) add_products<bits, blocks, 1>(m, row, x, i, results);
}

// R rows from `row` on with all vectors, or with the only one if R > 1.
template <int bits, int blocks, int R, class Vectors>
void multiply_together(const PackedMatrix& m, const Vectors& x, int64_t row, float* results, int64_t n) {
  constexpr bool floats = std::is_same_v<Vectors, FloatVectors>;
  Products products[R] = {};
  const auto for_groups = [&](auto function) {
    PackedGroups rows[R];
    for (int64_t first = 0; first < m.groups; first += kGroupsAtOnce) {
      with_format(m.format, m.scales, [&](const auto* scales) __attribute__((always_inline)) {
        for (int r = 0; r < R; ++r) {
          rows[r].first = first;
          load_groups(m, scales, row + r, floats ? 0 : kCentre<bits>, rows[r]);
        }
      });
      function(rows);
    }
  };
  for_groups([&](const PackedGroups(&rows)[R]) {
    if constexpr (R > 1) {
      add_products<bits, blocks, 1>(m, rows, x, 0, products);
    } else {
      add_all_products<bits, blocks>(m, rows, x, products);
    }
  });
  for (int r = 0; r < R; ++r) {
    for (int64_t i = 0; i < x.count; ++i) {
      if constexpr (floats) {
        if (!std::isfinite(products[r][i])) {
          products[r][i] = 0;
          for_groups([&](const PackedGroups(&rows)[R]) { add_exact_product(m, rows[r], x, i, products[r][i]); });
        }
      }
      results[i * n + r] = products[r][i];
    }
  }
}

template <int bits, int blocks, class Vectors>
void multiply_rows(const PackedMatrix& m, const Vectors& x, int64_t begin, int64_t end, float* results, int64_t n) {
  constexpr int kRows = 4;
  int64_t row = begin;
  for (; x.count == 1 && row + kRows <= end; row += kRows) {
    multiply_together<bits, blocks, kRows>(m, x, row, results + row - begin, n);
  }
  for (; row < end; ++row) multiply_together<bits, blocks, 1>(m, x, row, results + row - begin, n);
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
