// Shifts of scalars: Metal takes the count modulo the bits of the shifted number, C++ leaves other counts undefined.
// The front end writes `a << b` as `a << msl_shl << b`, which groups as before, and `a <<= b` as `a << msl_shl_to = b`.
#pragma once

namespace metal {

template <class T, class U>
MSL_FN constexpr auto msl_count(U count) {
  return count & U(8 * sizeof(decltype(+T())) - 1);
}

#define MSL_SHIFT_OPERATOR(OP, NAME)                                         \
  struct NAME##_operator {};                                                 \
  constexpr NAME##_operator NAME;                                            \
  template <class T>                                                         \
  struct NAME##_left {                                                       \
    T a;                                                                     \
  };                                                                         \
  template <class T>                                                         \
  MSL_FN constexpr NAME##_left<T> operator OP(T a, NAME##_operator) {        \
    return {a};                                                              \
  }                                                                          \
  template <class T, class U>                                                \
  MSL_FN constexpr auto operator OP(NAME##_left<T> left, const U& count) {   \
    if constexpr (__is_class(T) || __is_class(U)) {                          \
      return left.a OP count;                                                \
    } else {                                                                 \
      return left.a OP msl_count<T>(+count);                                 \
    }                                                                        \
  }                                                                          \
  struct NAME##_to_operator {};                                              \
  constexpr NAME##_to_operator NAME##_to;                                    \
  template <class T>                                                         \
  struct NAME##_target {                                                     \
    T& a;                                                                    \
    template <class U>                                                       \
    MSL_FN constexpr T& operator=(const U& count) const {                    \
      return a = T(NAME##_left<T>{a} OP count);                              \
    }                                                                        \
  };                                                                         \
  template <class T>                                                         \
  MSL_FN constexpr NAME##_target<T> operator OP(T & a, NAME##_to_operator) { \
    return {a};                                                              \
  }
MSL_SHIFT_OPERATOR(<<, msl_shl)
MSL_SHIFT_OPERATOR(>>, msl_shr)

}  // namespace metal
