#include "half_runs.h"

#include <ATen/Version.h>

#include "convert.h"

#ifdef TORCH_FUSED_X86_DISPATCH
#include <immintrin.h>
#endif

namespace torch_fused {
namespace {

void widen_anywhere(const c10::Half* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}

void narrow_anywhere(const float* from, c10::Half* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = narrow<c10::Half>(from[i]);
}

#ifdef TORCH_FUSED_X86_DISPATCH

__attribute__((target("avx,f16c"))) void widen_f16c(const c10::Half* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  for (; i < n; ++i) to[i] = _cvtsh_ss(from[i].x);
}

__attribute__((target("avx,f16c"))) void narrow_f16c(const float* from, c10::Half* to, int64_t n) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), kNearest));
  }
  for (; i < n; ++i) to[i].x = _cvtss_sh(from[i], kNearest);
}

// As far as ATEN_CPU_CAPABILITY allows torch to go.
const bool has_f16c = at::get_cpu_capability() != "DEFAULT" && __builtin_cpu_supports("x86-64-v3");
const auto widen_best = has_f16c ? widen_f16c : widen_anywhere;
const auto narrow_best = has_f16c ? narrow_f16c : narrow_anywhere;

#else

constexpr auto widen_best = widen_anywhere;
constexpr auto narrow_best = narrow_anywhere;

#endif

}  // namespace

void widen_run(const c10::Half* from, float* to, int64_t n) {
  widen_best(from, to, n);
}

void narrow_run(const float* from, c10::Half* to, int64_t n) {
  narrow_best(from, to, n);
}

}  // namespace torch_fused
