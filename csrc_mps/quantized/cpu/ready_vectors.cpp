#include "ready_vectors.h"

#include <ATen/Version.h>

#include <string>

namespace torch_fused {
namespace {

struct Loops {
  void (*arrange_floats)(const PackedMatrix&, const float*, float*, float*);
  void (*arrange_codes)(const PackedMatrix&, const float*, int8_t*, float*, float*);
  void (*multiply_floats)(const PackedMatrix&, const FloatVectors&, int64_t, int64_t, float*, int64_t);
  void (*multiply_codes)(const PackedMatrix&, const IntegerVectors&, int64_t, int64_t, float*, int64_t);
};

// With the best instructions that the machine has, or that ATEN_CPU_CAPABILITY allows.
const Loops& loops() {
#define TORCH_FUSED_LOOPS(target)                                        \
  Loops {                                                                \
    target::arrange, target::arrange, target::multiply, target::multiply \
  }
  static const Loops best = [] {
#ifdef TORCH_FUSED_X86_DISPATCH
    const std::string allowed = at::get_cpu_capability();
    if (allowed == "AVX512" && __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512vnni")) {
      return TORCH_FUSED_LOOPS(vnni);
    }
    if (allowed != "DEFAULT" && __builtin_cpu_supports("x86-64-v3")) return TORCH_FUSED_LOOPS(avx2);
#endif
    return TORCH_FUSED_LOOPS(baseline);
  }();
  return best;
}

}  // namespace

void ReadyVectors::prepare(const PackedMatrix& m, const float* x, int64_t count, bool integers, float* memory) {
  bits_ = m.bits;
  group_size_ = m.group_size;
  integers_ = integers;
  // Of whole cache lines each: a register that is read from two of them takes longer.
  float* const sums = memory + -reinterpret_cast<uintptr_t>(memory) / sizeof(float) % 16;
  float* const scales = sums + count * m.sums;
  float* const values = integers ? scales + count * m.vector_scales() : scales;
  auto* const codes = reinterpret_cast<int8_t*>(values);
  for (int64_t i = 0; i < count; ++i) {
    if (integers) {
      loops().arrange_codes(m, x + i * m.cols, codes + i * m.padded, scales + i * m.vector_scales(), sums + i * m.sums);
    } else {
      loops().arrange_floats(m, x + i * m.cols, values + i * m.cols, sums + i * m.sums);
    }
  }
  floats_ = {values, sums, count};
  codes_ = {codes, scales, sums, count};
}

void ReadyVectors::multiply(const PackedMatrix& m, int64_t begin, int64_t end, float* results, int64_t n) const {
  if (integers_) return loops().multiply_codes(m, codes_, begin, end, results, n);
  loops().multiply_floats(m, floats_, begin, end, results, n);
}

}  // namespace torch_fused
