// 16-bit floats for CUDA.
#pragma once

namespace metal {

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

}  // namespace metal
