// Mathematics for CUDA, as far as this project's kernels need it: NVRTC compiles it on the user's machine, and every
// line takes time there. The emulator's is in mathematics.h.
#pragma once

namespace metal {

// Mathematics

#define MSL_VECTOR_UNARY(NAME)                              \
  template <class T, int N>                                 \
  MSL_FN vec<T, N> NAME(const vec<T, N>& v) {               \
    vec<T, N> result;                                       \
    for (int i = 0; i < N; i++) result.d[i] = NAME(v.d[i]); \
    return result;                                          \
  }
#define MSL_UNARY(NAME, EXPRESSION) \
  MSL_FN float NAME(float x) {      \
    return EXPRESSION;              \
  }                                 \
  MSL_FN half NAME(half h) {        \
    return half(NAME(float(h)));    \
  }                                 \
  MSL_FN bfloat NAME(bfloat h) {    \
    return bfloat(NAME(float(h)));  \
  }                                 \
  MSL_VECTOR_UNARY(NAME)
MSL_UNARY(exp, ::expf(x))
MSL_UNARY(exp2, ::exp2f(x))
MSL_UNARY(log, ::logf(x))
MSL_UNARY(log2, ::log2f(x))
MSL_UNARY(sqrt, ::sqrtf(x))
MSL_UNARY(rsqrt, msl_rsqrt(x))
MSL_UNARY(sin, ::sinf(x))
MSL_UNARY(cos, ::cosf(x))
MSL_UNARY(tanh, ::tanhf(x))
MSL_UNARY(floor, ::floorf(x))
MSL_UNARY(ceil, ::ceilf(x))
MSL_UNARY(rint, ::rintf(x))
MSL_UNARY(round, ::roundf(x))
MSL_UNARY(trunc, ::truncf(x))
MSL_UNARY(fabs, ::fabsf(x))
MSL_UNARY(sign, x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x)

MSL_FN float abs(float x) {
  return ::fabsf(x);
}
MSL_FN int abs(int x) {
  return x < 0 ? -x : x;
}
MSL_VECTOR_UNARY(abs)

#define MSL_VECTOR_BINARY(NAME)                                     \
  template <class T, int N>                                         \
  MSL_FN vec<T, N> NAME(const vec<T, N>& a, const vec<T, N>& b) {   \
    vec<T, N> result;                                               \
    for (int i = 0; i < N; i++) result.d[i] = NAME(a.d[i], b.d[i]); \
    return result;                                                  \
  }
#define MSL_BINARY(NAME, EXPRESSION)    \
  MSL_FN float NAME(float a, float b) { \
    return EXPRESSION;                  \
  }                                     \
  MSL_VECTOR_BINARY(NAME)
MSL_BINARY(pow, ::powf(a, b))
MSL_BINARY(fmax, ::fmaxf(a, b))
MSL_BINARY(fmin, ::fminf(a, b))
MSL_BINARY(max, ::fmaxf(a, b))
MSL_BINARY(min, ::fminf(a, b))
template <class T>
MSL_FN T max(T a, T b) {
  return a < b ? b : a;
}
template <class T>
MSL_FN T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
MSL_FN T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}
template <class T>
MSL_FN T select(T a, T b, bool condition) {
  return condition ? b : a;
}

MSL_FN float fma(float a, float b, float c) {
  return ::fmaf(a, b, c);
}
template <class T, int N>
MSL_FN vec<T, N> fma(const vec<T, N>& a, const vec<T, N>& b, const vec<T, N>& c) {
  vec<T, N> result;
  for (int i = 0; i < N; i++) result.d[i] = fma(a.d[i], b.d[i], c.d[i]);
  return result;
}

MSL_FN bool isnan(float x) {
  return x != x;
}
MSL_FN bool isinf(float x) {
  return ::fabsf(x) == INFINITY;
}
MSL_FN bool isfinite(float x) {
  return ::fabsf(x) < INFINITY;
}

MSL_FN uint popcount(uint x) {
  return msl_popcount(x);
}
MSL_FN uint clz(uint x) {
  return msl_clz(x);
}
MSL_FN uint ctz(uint x) {
  return x ? 31 - msl_clz(x & -x) : 32;
}
MSL_FN uint mulhi(uint a, uint b) {
  return uint((ulong(a) * b) >> 32);
}

namespace precise {
MSL_BINARY(divide, a / b)
using metal::cos;
using metal::exp;
using metal::exp2;
using metal::fmax;
using metal::fmin;
using metal::log;
using metal::log2;
using metal::max;
using metal::min;
using metal::pow;
using metal::rsqrt;
using metal::sin;
using metal::sqrt;
using metal::tanh;
}  // namespace precise

template <class T, int N>
MSL_FN vec<T, N> select(const vec<T, N>& a, const vec<T, N>& b, const vec<bool, N>& condition) {
  vec<T, N> result;
  for (int i = 0; i < N; i++) result.d[i] = condition.d[i] ? b.d[i] : a.d[i];
  return result;
}

}  // namespace metal
