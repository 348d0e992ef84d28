// Products of packed rows of 4 and 8 bits, as floats and as integers.
#include "check.h"
#include "packed.h"
#include "quantized/cpu/ready_vectors.h"

using namespace torch_fused;
using namespace check;

namespace {

enum class Vectors { kFloats, kExactIntegers, kIntegers };

std::string describe(const PackedNumbers& m, int64_t count, Vectors kind) {
  const char* names[] = {"floats", "whole numbers as integers", "integers"};
  return std::to_string(m.bits) + " bits in groups of " + std::to_string(m.group_size) + ", scales " +
         name_of(m.scales.format()) + ", " + std::to_string(m.cols) + " columns, " + std::to_string(count) +
         " vectors, " + names[static_cast<int>(kind)];
}

// Whole numbers of which those that share a scale have 127 come through int8 unchanged.
std::vector<float> make_vectors(Random& random, int64_t count, int64_t cols, Vectors kind) {
  std::vector<float> x(count * cols);
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = static_cast<float>(random.normal());
    if (kind == Vectors::kExactIntegers) x[i] = i % kScaled == 5 ? -127 : static_cast<float>(random.below(255) - 127);
  }
  return x;
}

void check_product(const PackedNumbers& m, int64_t count, Vectors kind, Random& random) {
  const std::vector<float> x = make_vectors(random, count, m.cols, kind);
  std::vector<float> memory(ReadyVectors::size(m.cols, count));
  ReadyVectors ready;
  ready.prepare(m.matrix(), x.data(), count, kind != Vectors::kFloats, memory.data());
  const int64_t begin = 1, rows = m.rows - 1, n = rows + 3;
  std::vector<float> results(count * n, 7.0f);
  ready.multiply(m.matrix(), begin, m.rows, results.data(), n);
  const std::string what = describe(m, count, kind);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t row = 0; row < rows; ++row) {
      double expected = 0, size = 0, rounding = 0;
      for (int64_t block = 0; block < m.cols; block += kScaled) {
        double largest = 0, weights = 0;
        for (int64_t col = block; col < block + kScaled; ++col) {
          const double weight = m.at(begin + row, col), value = x[i * m.cols + col];
          expected += weight * value;
          size += std::fabs(value) * (std::fabs(m.scaled_code(begin + row, col)) + std::fabs(m.bias(begin + row, col)));
          largest = std::max(largest, std::fabs(value));
          weights += weight * weight;
        }
        rounding += weights * largest * largest / (127 * 127 * 12.0);  // the variance of rounding to int8
      }
      // Six standard deviations: a wrong code, sign or scale is far more.
      const double tolerance = 1e-6 * size + (kind == Vectors::kIntegers ? 6 * std::sqrt(rounding) : 0);
      close(what, results[i * n + row], expected, tolerance);
    }
    for (int64_t row = rows; row < n; ++row) close(what + ", past the rows", results[i * n + row], 7, 0);
  }
}

// Infinities and NaN among the values: as floats the unpacked matrix's result, as integers NaN.
void check_special(int64_t bits, int64_t group_size) {
  Random random(9);
  const PackedNumbers m(random, 3, 384, bits, group_size, kFloat32);
  for (float special : {INFINITY, -INFINITY, NAN, 3e38f}) {
    std::vector<float> x = make_vectors(random, 1, m.cols, Vectors::kFloats);
    x[77] = special;
    for (bool integers : {false, true}) {
      std::vector<float> memory(ReadyVectors::size(m.cols, 1)), results(3);
      ReadyVectors ready;
      ready.prepare(m.matrix(), x.data(), 1, integers, memory.data());
      ready.multiply(m.matrix(), 0, 3, results.data(), 3);
      for (int64_t row = 0; row < 3; ++row) {
        double expected = 0;
        for (int64_t col = 0; col < m.cols; ++col) expected += m.at(row, col) * x[col];
        if (integers) {
          if (!std::isfinite(special)) close("a value that is not finite, as integers", results[row], NAN, 0);
        } else if (std::fabs(expected) < 3e38 || !std::isfinite(expected)) {
          close("a value that is not finite", results[row], expected, 1e-5 * std::fabs(expected));
        }
      }
    }
  }
}

}  // namespace

int main() {
  Random random(5);
  for (int64_t bits : {4, 8}) {
    for (int64_t group_size : {32, 64, 128}) {
      check_special(bits, group_size);
      for (uint32_t format : {kFloat32, kFloat16, kBFloat16}) {
        // One group, a few, and more than are loaded at once; of 32 and 64, numbers of blocks that are odd.
        for (int64_t cols : {group_size, 3 * group_size, 384 + group_size, 70 * group_size}) {
          const PackedNumbers m(random, cols > 2000 ? 3 : 6, cols, bits, group_size, format);
          for (int64_t count : {1, 2, 3, 4, 7}) {
            for (Vectors kind : {Vectors::kFloats, Vectors::kExactIntegers, Vectors::kIntegers}) {
              check_product(m, count, kind, random);
            }
          }
        }
      }
    }
  }
  return finish("quantized products");
}
