// Vectors made ready for the rows of packed matrices, and the loops of this machine's instruction set.
#pragma once

#include "packed.h"

namespace torch_fused {

class ReadyVectors {
 public:
  // Floats of memory for `count` vectors of at most this many columns.
  static int64_t size(int64_t cols, int64_t count) { return count * (2 * cols + 256); }

  // Makes `x`, (count, cols), ready for the rows of a matrix. `integers`: the values are rounded to int8.
  void prepare(const PackedMatrix& m, const float* x, int64_t count, bool integers, float* memory);

  // Whether they are ready for the rows of this matrix, in that way.
  bool serve(const PackedMatrix& m, bool integers) const {
    return m.bits == bits_ && m.group_size == group_size_ && integers == integers_;
  }

  // The product of row begin + r and vector i goes to results[i * n + r].
  void multiply(const PackedMatrix& m, int64_t begin, int64_t end, float* results, int64_t n) const;

 private:
  int64_t bits_ = 0, group_size_ = 0;
  bool integers_ = false;
  FloatVectors floats_{};
  IntegerVectors codes_{};
};

}  // namespace torch_fused
