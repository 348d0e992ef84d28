// What of Metal's standard library is the same on the host and on CUDA. Comes after vector.h and the primitives of the
// target: conversions of 16-bit floats and the few bit operations that C++ lacks.
#pragma once

#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define MAXFLOAT FLT_MAX
#define HALF_MAX half(65504.0f)
#define M_PI_F 3.14159265358979f
#define M_LOG2E_F 1.44269504088896f
#define M_LN2_F 0.69314718055995f

namespace metal {

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;

template <class To, class From>
MSL_FN To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type: the sizes differ");
  To to;
  msl_copy(&to, &from, sizeof(to));
  return to;
}

// 16-bit floats: stored as bits, computed with in float, rounded to nearest even
struct half {
  ushort bits;
  half() = default;
  MSL_FN half(float f) : bits(msl_half_bits(f)) {}
  MSL_FN operator float() const { return msl_half_value(bits); }
};
struct bfloat {
  ushort bits;
  bfloat() = default;
  MSL_FN bfloat(float f) : bits(msl_bfloat_bits(f)) {}
  MSL_FN operator float() const { return as_type<float>(uint(bits) << 16); }
};

template <class T>
struct is_half_type {
  static constexpr bool v = same_t<T, half>::v || same_t<T, bfloat>::v;
};
template <class T>
MSL_FN typename eif<is_half_type<T>::v, T>::type operator-(T a) {
  a.bits ^= 0x8000;
  return a;
}
// Two of one type make that type; with a float, the built-in operator makes a float
#define MSL_HALF_ARITHMETIC(OP)                                                  \
  template <class T>                                                             \
  MSL_FN typename eif<is_half_type<T>::v, T>::type operator OP(T a, T b) {       \
    return T(float(a) OP float(b));                                              \
  }                                                                              \
  template <class T, class U>                                                    \
  MSL_FN typename eif<is_half_type<T>::v, T>::type& operator OP##=(T & a, U b) { \
    return a = T(float(a) OP float(b));                                          \
  }
MSL_HALF_ARITHMETIC(+)
MSL_HALF_ARITHMETIC(-)
MSL_HALF_ARITHMETIC(*)
MSL_HALF_ARITHMETIC(/)

#define MSL_VECTORS(T)    \
  using T##2 = vec<T, 2>; \
  using T##3 = vec<T, 3>; \
  using T##4 = vec<T, 4>;
MSL_VECTORS(float)
MSL_VECTORS(half)
MSL_VECTORS(bfloat)
MSL_VECTORS(int)
MSL_VECTORS(uint)
MSL_VECTORS(short)
MSL_VECTORS(ushort)
MSL_VECTORS(char)
MSL_VECTORS(uchar)
MSL_VECTORS(long)
MSL_VECTORS(ulong)
MSL_VECTORS(bool)
using packed_float3 = packed3<float>;
using packed_float4 = packed4<float>;
using packed_half3 = packed3<half>;
using packed_half4 = packed4<half>;

template <class T>
struct same_as {  // keeps an argument out of template deduction
  using type = T;
};

// Type traits and limits

template <class A, class B>
constexpr bool is_same_v = same_t<A, B>::v;
template <class A, class B>
struct is_same {
  static constexpr bool value = same_t<A, B>::v;
};
template <bool Condition, class T = void>
using enable_if_t = typename eif<Condition, T>::type;
template <bool Condition, class T, class F>
struct conditional {
  using type = T;
};
template <class T, class F>
struct conditional<false, T, F> {
  using type = F;
};
template <bool Condition, class T, class F>
using conditional_t = typename conditional<Condition, T, F>::type;

template <class T>
struct numeric_limits;
#define MSL_INTEGER_LIMITS(T, MIN, MAX) \
  template <>                           \
  struct numeric_limits<T> {            \
    static constexpr T min() {          \
      return MIN;                       \
    }                                   \
    static constexpr T lowest() {       \
      return MIN;                       \
    }                                   \
    static constexpr T max() {          \
      return MAX;                       \
    }                                   \
  };
MSL_INTEGER_LIMITS(int, -0x7fffffff - 1, 0x7fffffff)
MSL_INTEGER_LIMITS(uint, 0, ~0u)
MSL_INTEGER_LIMITS(long, -0x7fffffffffffffff - 1, 0x7fffffffffffffff)
MSL_INTEGER_LIMITS(ulong, 0, ~0ul)
#define MSL_FLOAT_LIMITS(T, CONSTEXPR, MIN, MAX) \
  template <>                                    \
  struct numeric_limits<T> {                     \
    static CONSTEXPR T min() {                   \
      return T(MIN);                             \
    }                                            \
    static CONSTEXPR T lowest() {                \
      return T(-MAX);                            \
    }                                            \
    static CONSTEXPR T max() {                   \
      return T(MAX);                             \
    }                                            \
    static CONSTEXPR T infinity() {              \
      return T(INFINITY);                        \
    }                                            \
    static CONSTEXPR T quiet_NaN() {             \
      return T(NAN);                             \
    }                                            \
  };
MSL_FLOAT_LIMITS(float, constexpr, FLT_MIN, FLT_MAX)
MSL_FLOAT_LIMITS(half, MSL_FN, 6.103515625e-05f, 65504.0f)
MSL_FLOAT_LIMITS(bfloat, MSL_FN, FLT_MIN, 3.38953139e+38f)

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

// Barriers, votes and atomics: their types

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
MSL_FN mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(int(a) | int(b));
}

struct simd_vote {
  ulong bits;
  MSL_FN explicit simd_vote(ulong bits) : bits(bits) {}
  MSL_FN explicit operator ulong() const { return bits; }
  MSL_FN bool any() const { return bits != 0; }
};

enum memory_order { memory_order_relaxed };
template <class T>
struct atomic {
  T value;
};
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;

}  // namespace metal
