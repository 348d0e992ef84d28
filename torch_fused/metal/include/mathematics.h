// Metal's common, math and relational functions, and those that precise:: and fast:: hold variants of.
#pragma once

namespace metal {

MSL_FLOAT_1(acos, ::acosf(x))
MSL_FLOAT_1(acosh, ::acoshf(x))
MSL_FLOAT_1(asin, ::asinf(x))
MSL_FLOAT_1(asinh, ::asinhf(x))
MSL_FLOAT_1(atan, ::atanf(x))
MSL_FLOAT_1(atanh, ::atanhf(x))
MSL_FLOAT_1(ceil, ::ceilf(x))
MSL_FLOAT_1(cos, ::cosf(x))
MSL_FLOAT_1(cosh, ::coshf(x))
MSL_FLOAT_1(exp, ::expf(x))
MSL_FLOAT_1(exp2, ::exp2f(x))
MSL_FLOAT_1(exp10, float(::pow(10.0, double(x))))
MSL_FLOAT_1(fabs, ::fabsf(x))
MSL_FLOAT_1(floor, ::floorf(x))
MSL_FLOAT_1(log, ::logf(x))
MSL_FLOAT_1(log2, ::log2f(x))
MSL_FLOAT_1(log10, ::log10f(x))
MSL_FLOAT_1(rint, ::rintf(x))
MSL_FLOAT_1(round, ::roundf(x))
MSL_FLOAT_1(rsqrt, 1.0f / ::sqrtf(x))
MSL_FLOAT_1(sin, ::sinf(x))
MSL_FLOAT_1(sinh, ::sinhf(x))
MSL_FLOAT_1(sqrt, ::sqrtf(x))
MSL_FLOAT_1(tan, ::tanf(x))
MSL_FLOAT_1(tanh, ::tanhf(x))
MSL_FLOAT_1(trunc, ::truncf(x))
MSL_FLOAT_1(sign, x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x == 0.0f ? x : 0.0f)

MSL_FLOAT_2(atan2, ::atan2f(x, y))
MSL_FLOAT_2(copysign, ::copysignf(x, y))
MSL_FLOAT_2(fdim, ::fdimf(x, y))
MSL_FLOAT_2(fmax, ::fmaxf(x, y))
MSL_FLOAT_2(fmin, ::fminf(x, y))
MSL_FLOAT_2(fmod, ::fmodf(x, y))
MSL_FLOAT_2(pow, ::powf(x, y))
MSL_FLOAT_2(powr, x < 0.0f ? NAN : ::powf(x, y))
MSL_FLOAT_2(step, y < x ? 0.0f : 1.0f)
MSL_FLOAT_2(max, ::fmaxf(x, y))
MSL_FLOAT_2(min, ::fminf(x, y))
MSL_FLOAT_2(divide, x / y)

MSL_FLOAT_3(fmax3, ::fmaxf(x, ::fmaxf(y, z)))
MSL_FLOAT_3(fmin3, ::fminf(x, ::fminf(y, z)))
MSL_FLOAT_3(fmedian3, ::fmaxf(::fminf(x, y), ::fminf(::fmaxf(x, y), z)))
MSL_FLOAT_3(max3, ::fmaxf(x, ::fmaxf(y, z)))
MSL_FLOAT_3(min3, ::fminf(x, ::fminf(y, z)))
MSL_FLOAT_3(median3, ::fmaxf(::fminf(x, y), ::fminf(::fmaxf(x, y), z)))
MSL_FLOAT_3(clamp, ::fminf(::fmaxf(x, y), z))
MSL_FLOAT_1(saturate, ::fminf(::fmaxf(x, 0.0f), 1.0f))

// The number modulo 2 is exact, and the rest is computed in double: multiples of a half have exact results.
MSL_FN double msl_turn(float x) {
  return ::fmod(double(x), 2.0);
}
MSL_FN float msl_sinpi(float x) {
  const double turn = msl_turn(x);
  return turn == 0.0 || turn == 1.0 || turn == -1.0 ? ::copysignf(0.0f, x)
                                                    : float(::sin(turn * 3.14159265358979323846));
}
MSL_FN float msl_cospi(float x) {
  const double turn = msl_turn(x);
  return turn == 0.5 || turn == 1.5 || turn == -0.5 || turn == -1.5 ? 0.0f
                                                                    : float(::cos(turn * 3.14159265358979323846));
}
MSL_FLOAT_1(sinpi, msl_sinpi(x))
MSL_FLOAT_1(cospi, msl_cospi(x))
MSL_FLOAT_1(tanpi, msl_sinpi(x) / msl_cospi(x))

// Those that compute in their own type: every operation rounds to it. fma rounds once.
MSL_FN float fma(float x, float y, float z) {
  return ::fmaf(x, y, z);
}
MSL_FN half fma(half x, half y, half z) {
  return half(double(x) * double(y) + double(z));
}
MSL_OF_BFLOAT_3(fma)

#define MSL_OWN_ARITHMETIC(T)                          \
  MSL_FN T mix(T x, T y, T a) {                        \
    return x + (y - x) * a;                            \
  }                                                    \
  MSL_FN T smoothstep(T low, T high, T x) {            \
    const T t = saturate(T((x - low) / (high - low))); \
    return t * t * (T(3.0f) - T(2.0f) * t);            \
  }
MSL_OWN_ARITHMETIC(float)
MSL_OWN_ARITHMETIC(half)
MSL_OF_BFLOAT_3(mix)
MSL_OF_BFLOAT_3(smoothstep)

MSL_FN float msl_fract(float x, float below_one) {
  const float f = x - ::floorf(x);
  return f > below_one ? below_one : f;
}
MSL_FN float fract(float x) {
  return msl_fract(x, 0x1.fffffep-1f);
}
MSL_FN half fract(half x) {
  return half(msl_fract(float(x), 0x1.ffcp-1f));
}
MSL_OF_BFLOAT_1(fract)

// The next number of its own type
template <class T, class Bits>
MSL_FN T msl_nextafter(T x, T y) {
  const float a = float(x), b = float(y);
  if (a != a || b != b) return T(NAN);
  if (a == b) return y;
  constexpr Bits sign = Bits(1) << (8 * sizeof(Bits) - 1);
  if (a == 0.0f) return as_type<T>(Bits(b < 0.0f ? sign | 1 : 1));
  return as_type<T>(Bits(as_type<Bits>(x) + ((a < b) == (a > 0.0f) ? 1 : -1)));
}
MSL_FN float nextafter(float x, float y) {
  return msl_nextafter<float, uint>(x, y);
}
MSL_FN half nextafter(half x, half y) {
  return msl_nextafter<half, ushort>(x, y);
}
template <MSL_BFLOAT>
MSL_FN T nextafter(T x, T y) {
  return msl_nextafter<T, ushort>(x, y);
}
MSL_VECTOR_2(nextafter)

// Exponents, and functions with a second result
#define MSL_EXPONENTS(T)                           \
  MSL_FN int ilogb(T x) {                          \
    return ::ilogbf(float(x));                     \
  }                                                \
  MSL_FN T ldexp(T x, int exponent) {              \
    return T(::ldexp(double(float(x)), exponent)); \
  }                                                \
  MSL_FN T frexp(T x, int& exponent) {             \
    exponent = 0;                                  \
    return T(::frexpf(float(x), &exponent));       \
  }                                                \
  MSL_FN T modf(T x, T& whole) {                   \
    float part;                                    \
    const float rest = ::modff(float(x), &part);   \
    whole = T(part);                               \
    return T(rest);                                \
  }                                                \
  MSL_FN T sincos(T x, T& cosine) {                \
    cosine = cos(x);                               \
    return sin(x);                                 \
  }
MSL_EXPONENTS(float)
MSL_EXPONENTS(half)
template <MSL_BFLOAT>
MSL_FN int ilogb(T x) {
  return ilogb(float(x));
}
template <MSL_BFLOAT>
MSL_FN float ldexp(T x, int exponent) {
  return ldexp(float(x), exponent);
}
template <MSL_BFLOAT>
MSL_FN float frexp(T x, int& exponent) {
  return frexp(float(x), exponent);
}
MSL_ELEMENTWISE_1(ilogb, math_vector_of)
#define MSL_SECOND_RESULT(NAME, SECOND)                                  \
  template <class T, int N>                                              \
  MSL_FN vec<T, N> NAME(vec<T, N> x, vec<SECOND, N>& second) {           \
    vec<T, N> result;                                                    \
    for (int i = 0; i < N; i++) result.d[i] = NAME(x.d[i], second.d[i]); \
    return result;                                                       \
  }
MSL_SECOND_RESULT(frexp, int)
MSL_SECOND_RESULT(modf, T)
MSL_SECOND_RESULT(sincos, T)
template <class T, int N>
MSL_FN vec<T, N> ldexp(vec<T, N> x, vec<int, N> exponent) {
  for (int i = 0; i < N; i++) x.d[i] = ldexp(x.d[i], exponent.d[i]);
  return x;
}

// Relational functions

#define MSL_RELATIONAL_1(NAME, EXPRESSION) \
  MSL_FN bool NAME(float x) {              \
    return EXPRESSION;                     \
  }                                        \
  MSL_FN bool NAME(half x) {               \
    return NAME(float(x));                 \
  }                                        \
  template <MSL_BFLOAT>                    \
  MSL_FN bool NAME(T x) {                  \
    return NAME(float(x));                 \
  }                                        \
  MSL_VECTOR_1(NAME)
#define MSL_RELATIONAL_2(NAME, EXPRESSION) \
  MSL_FN bool NAME(float x, float y) {     \
    return EXPRESSION;                     \
  }                                        \
  MSL_FN bool NAME(half x, half y) {       \
    return NAME(float(x), float(y));       \
  }                                        \
  template <MSL_BFLOAT>                    \
  MSL_FN bool NAME(T x, T y) {             \
    return NAME(float(x), float(y));       \
  }                                        \
  MSL_VECTOR_2(NAME)
MSL_RELATIONAL_1(isfinite, ::fabsf(x) < INFINITY)
MSL_RELATIONAL_1(isinf, ::fabsf(x) == INFINITY)
MSL_RELATIONAL_1(isnan, x != x)
MSL_RELATIONAL_1(signbit, msl_bits(x) >> 31 != 0)
MSL_RELATIONAL_2(isordered, x == x && y == y)
MSL_RELATIONAL_2(isunordered, x != x || y != y)
MSL_FN bool isnormal(float x) {
  return ::fabsf(x) >= FLT_MIN && ::fabsf(x) < INFINITY;
}
MSL_FN bool isnormal(half x) {
  return ::fabsf(float(x)) >= 0x1p-14f && ::fabsf(float(x)) < INFINITY;
}
template <MSL_BFLOAT>
MSL_FN bool isnormal(T x) {
  return isnormal(float(x));
}
MSL_VECTOR_1(isnormal)

template <class T>
MSL_FN T select(T a, T b, bool condition) {
  return condition ? b : a;
}
template <class A, class B, class V = vector_of<A, B>, int N>
MSL_FN V select(const A& first, const B& second, const vec<bool, N>& condition) {
  static_assert(N == vtraits<V>::n, "select: a condition for each element");
  V a(first), b(second), result;
  for (int i = 0; i < N; i++) result.d[i] = condition.d[i] ? b.d[i] : a.d[i];
  return result;
}

}  // namespace metal
