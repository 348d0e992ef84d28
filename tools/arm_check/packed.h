// A packed matrix of random codes, and its values.
#pragma once

#include "check.h"
#include "quantized/cpu/packed.h"

namespace check {

struct PackedNumbers {
  std::vector<uint32_t> words;
  Stored scales, biases;
  int64_t rows, cols, bits, group_size;

  PackedNumbers() = default;
  PackedNumbers(Random& random, int64_t rows, int64_t cols, int64_t bits, int64_t group_size, uint32_t format,
                double scale = 0.02)
      : words(rows * cols * bits / 32),
        scales(normals(random, rows * cols / group_size, scale, scale), format),
        biases(normals(random, rows * cols / group_size, scale, -8 * scale), format),
        rows(rows),
        cols(cols),
        bits(bits),
        group_size(group_size) {
    for (uint32_t& word : words) word = static_cast<uint32_t>(random.bits());
  }

  torch_fused::PackedMatrix matrix() const {
    const int64_t groups = cols / group_size;
    return {words.data(), scales.data(),    biases.data(), scales.format(), cols, bits,
            group_size,   cols * bits / 32, groups,        groups,          rows};
  }
  // The first column's code is in the lowest bits of a word.
  double scaled_code(int64_t row, int64_t col) const {
    const int64_t each = 32 / bits;
    const uint32_t code = words[(row * cols + col) / each] >> (col % each * bits) & ((1u << bits) - 1);
    return scales[group(row, col)] * code;
  }
  double bias(int64_t row, int64_t col) const { return biases[group(row, col)]; }
  double at(int64_t row, int64_t col) const { return scaled_code(row, col) + bias(row, col); }

 private:
  int64_t group(int64_t row, int64_t col) const { return row * (cols / group_size) + col / group_size; }
};

}  // namespace check
