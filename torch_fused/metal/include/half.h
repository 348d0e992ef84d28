// The emulator's 16-bit floats: stored as bits, computed with in float, rounded to nearest even after every operation.
// half is the compiler's own type where it has one: that one mixes with other numbers as Metal's does.
#pragma once

namespace metal {

// A float such that rounding it once more, to 16 bits, is as good as rounding x
constexpr float msl_odd(unsigned long magnitude) {
  int scale = 0;
  for (; magnitude >> 24; scale++) magnitude = magnitude >> 1 | (magnitude & 1);
  float f = float(magnitude);
  for (; scale > 0; scale--) f *= 2.0f;
  return f;
}
inline float msl_odd(double x) {
  const float f = float(x);
  if (f == x || x != x) return f;
  const bool above = double(f < 0 ? -f : f) > (x < 0 ? -x : x);
  return msl_float((msl_bits(f) - above) | 1);
}
template <class T>
MSL_FN constexpr float msl_odd_integer(T x) {
  return x < T(0) ? -msl_odd(0ul - (unsigned long)x) : msl_odd((unsigned long)x);
}

// It converts to every number but int by itself: of `c ? 0 : b` there is then one reading.
#define MSL_SIXTEEN_BITS(NAME, EXPLICIT, TO_BITS, TO_FLOAT)                                                         \
  struct NAME {                                                                                                     \
    unsigned short bits;                                                                                            \
    NAME() = default;                                                                                               \
    MSL_FN EXPLICIT constexpr NAME(float f) : bits(TO_BITS(f)) {}                                                   \
    MSL_FN explicit NAME(double x) : NAME(msl_odd(x)) {}                                                            \
    template <class T, class = typename eif<is_integer<T>::v>::type>                                                \
    MSL_FN constexpr NAME(T x) : NAME(msl_odd_integer(x)) {}                                                        \
    template <class T, class = typename eif<same_t<T, half>::v && !same_t<NAME, half>::v>::type, class = void>      \
    MSL_FN explicit constexpr NAME(T x) : NAME(float(x)) {}                                                         \
    template <class T, class = typename eif<same_t<T, float>::v || (is_integer<T>::v && !same_t<T, int>::v)>::type> \
    MSL_FN constexpr operator T() const {                                                                           \
      return T(TO_FLOAT(bits));                                                                                     \
    }                                                                                                               \
    template <class T, class = typename eif<same_t<T, int>::v || same_t<T, double>::v || same_t<T, half>::v>::type, \
              class = void>                                                                                         \
    MSL_FN explicit constexpr operator T() const {                                                                  \
      return T(TO_FLOAT(bits));                                                                                     \
    }                                                                                                               \
    MSL_FN NAME& operator++() {                                                                                     \
      return *this = NAME(TO_FLOAT(bits) + 1.0f);                                                                   \
    }                                                                                                               \
    MSL_FN NAME& operator--() {                                                                                     \
      return *this = NAME(TO_FLOAT(bits) - 1.0f);                                                                   \
    }                                                                                                               \
    MSL_FN NAME operator++(int) {                                                                                   \
      const NAME old = *this;                                                                                       \
      ++*this;                                                                                                      \
      return old;                                                                                                   \
    }                                                                                                               \
    MSL_FN NAME operator--(int) {                                                                                   \
      const NAME old = *this;                                                                                       \
      --*this;                                                                                                      \
      return old;                                                                                                   \
    }                                                                                                               \
  };

#ifdef __FLT16_MAX__
using half = _Float16;
#else
struct half;
MSL_SIXTEEN_BITS(half, , msl_half_bits, msl_half_value)
#endif
#if defined(__BFLT16_MAX__) || __clang_major__ >= 17
using bfloat = __bf16;
#else
// Neither float nor half converts to it by itself
MSL_SIXTEEN_BITS(bfloat, explicit, msl_bfloat_bits, msl_bfloat_value)
#endif

template <class T>
struct is_half_type {
  static constexpr bool v = same_t<T, half>::v || same_t<T, bfloat>::v;
};
// Operators of those that are no type of the compiler's
template <class T>
struct is_half_class {
  static constexpr bool v = is_half_type<T>::v && __is_class(T);
};
template <class T, class R = T>
using of_half_class = typename eif<is_half_class<T>::v, R>::type;
template <class T, class U, class R = T>
using with_integer = typename eif<is_half_class<T>::v && is_integer<U>::v, R>::type;
template <class T, class U>
using with_number = typename eif<is_half_class<T>::v && (is_integer<U>::v || same_t<U, float>::v), U&>::type;

template <class T>
MSL_FN constexpr of_half_class<T> operator-(T a) {
  a.bits ^= 0x8000;
  return a;
}
template <class T>
MSL_FN constexpr of_half_class<T> operator+(T a) {
  return a;
}
// Two of one type, or one and an integer, make that type; with a float they make a float
#define MSL_HALF_ARITHMETIC(OP)                                        \
  template <class T>                                                   \
  MSL_FN constexpr of_half_class<T> operator OP(T a, T b) {            \
    return T(float(a) OP float(b));                                    \
  }                                                                    \
  template <class T, class U>                                          \
  MSL_FN constexpr with_integer<T, U> operator OP(T a, U b) {          \
    return a OP T(b);                                                  \
  }                                                                    \
  template <class U, class T>                                          \
  MSL_FN constexpr with_integer<T, U> operator OP(U a, T b) {          \
    return T(a) OP b;                                                  \
  }                                                                    \
  template <class T>                                                   \
  MSL_FN constexpr of_half_class<T, float> operator OP(T a, float b) { \
    return float(a) OP b;                                              \
  }                                                                    \
  template <class T>                                                   \
  MSL_FN constexpr of_half_class<T, float> operator OP(float a, T b) { \
    return a OP float(b);                                              \
  }                                                                    \
  template <class T, class U>                                          \
  MSL_FN constexpr of_half_class<T, T&> operator OP##=(T & a, U b) {   \
    return a = T(a OP b);                                              \
  }                                                                    \
  template <class U, class T>                                          \
  MSL_FN constexpr with_number<T, U> operator OP##=(U & a, T b) {      \
    return a = U(a OP b);                                              \
  }
MSL_HALF_ARITHMETIC(+)
MSL_HALF_ARITHMETIC(-)
MSL_HALF_ARITHMETIC(*)
MSL_HALF_ARITHMETIC(/)
#define MSL_HALF_COMPARISON(OP)                                       \
  template <class T>                                                  \
  MSL_FN constexpr of_half_class<T, bool> operator OP(T a, T b) {     \
    return float(a) OP float(b);                                      \
  }                                                                   \
  template <class T>                                                  \
  MSL_FN constexpr of_half_class<T, bool> operator OP(T a, float b) { \
    return float(a) OP b;                                             \
  }                                                                   \
  template <class T>                                                  \
  MSL_FN constexpr of_half_class<T, bool> operator OP(float a, T b) { \
    return a OP float(b);                                             \
  }                                                                   \
  template <class T, class U>                                         \
  MSL_FN constexpr with_integer<T, U, bool> operator OP(T a, U b) {   \
    return float(a) OP float(T(b));                                   \
  }                                                                   \
  template <class U, class T>                                         \
  MSL_FN constexpr with_integer<T, U, bool> operator OP(U a, T b) {   \
    return float(T(a)) OP float(b);                                   \
  }
MSL_HALF_COMPARISON(<)
MSL_HALF_COMPARISON(>)
MSL_HALF_COMPARISON(<=)
MSL_HALF_COMPARISON(>=)
MSL_HALF_COMPARISON(==)
MSL_HALF_COMPARISON(!=)

}  // namespace metal
