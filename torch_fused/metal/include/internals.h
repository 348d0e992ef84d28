// Names of Apple's own headers that sources in use know of: each is the public function, told whether to be fast.
#pragma once

namespace metal {

#define MSL_INTERNAL(NAME)                                   \
  template <class... A>                                      \
  MSL_FN auto __metal_##NAME(A... a)->decltype(NAME(a...)) { \
    return NAME(a...);                                       \
  }
#define MSL_INTERNAL_BITS(NAME)                            \
  template <class A>                                       \
  MSL_FN A __metal_##NAME(A a, MSL_HERE) {                 \
    if constexpr (is_integral_v<typename vtraits<A>::E>) { \
      return NAME(a, line_, file_);                        \
    } else {                                               \
      msl_rt.fail(#NAME " of floats", line_, file_);       \
      return a;                                            \
    }                                                      \
  }
#define MSL_INTERNAL_1(NAME)              \
  template <class A>                      \
  MSL_FN auto __metal_##NAME(A a, bool) { \
    return NAME(a);                       \
  }                                       \
  MSL_INTERNAL(NAME)
#define MSL_INTERNAL_2(NAME)                   \
  template <class A, class B>                  \
  MSL_FN auto __metal_##NAME(A a, B b, bool) { \
    return NAME(a, b);                         \
  }                                            \
  MSL_INTERNAL(NAME)
#define MSL_INTERNAL_3(NAME)                        \
  template <class A, class B, class C>              \
  MSL_FN auto __metal_##NAME(A a, B b, C c, bool) { \
    return NAME(a, b, c);                           \
  }                                                 \
  MSL_INTERNAL(NAME)
MSL_INTERNAL_1(fabs)
MSL_INTERNAL_1(acos)
MSL_INTERNAL_1(acosh)
MSL_INTERNAL_1(asin)
MSL_INTERNAL_1(asinh)
MSL_INTERNAL_1(atan)
MSL_INTERNAL_1(atanh)
MSL_INTERNAL_1(ceil)
MSL_INTERNAL_1(cos)
MSL_INTERNAL_1(cosh)
MSL_INTERNAL_1(cospi)
MSL_INTERNAL_1(exp)
MSL_INTERNAL_1(exp2)
MSL_INTERNAL_1(exp10)
MSL_INTERNAL_1(floor)
MSL_INTERNAL_1(fract)
MSL_INTERNAL_1(log)
MSL_INTERNAL_1(log2)
MSL_INTERNAL_1(log10)
MSL_INTERNAL_1(rint)
MSL_INTERNAL_1(round)
MSL_INTERNAL_1(rsqrt)
MSL_INTERNAL_1(sin)
MSL_INTERNAL_1(sinh)
MSL_INTERNAL_1(sinpi)
MSL_INTERNAL_1(sqrt)
MSL_INTERNAL_1(tan)
MSL_INTERNAL_1(tanh)
MSL_INTERNAL_1(tanpi)
MSL_INTERNAL_1(trunc)
MSL_INTERNAL_2(atan2)
MSL_INTERNAL_2(divide)
MSL_INTERNAL_2(fdim)
MSL_INTERNAL_2(fmax)
MSL_INTERNAL_2(fmin)
MSL_INTERNAL_2(fmod)
MSL_INTERNAL_2(pow)
MSL_INTERNAL_2(powr)
MSL_INTERNAL_2(nextafter)
MSL_INTERNAL_2(ldexp)
MSL_INTERNAL_2(copysign)
MSL_INTERNAL_3(fma)
MSL_INTERNAL_3(fmax3)
MSL_INTERNAL_3(fmin3)
MSL_INTERNAL_3(fmedian3)
MSL_INTERNAL_BITS(simd_and)
MSL_INTERNAL(simd_broadcast)
MSL_INTERNAL(simd_max)
MSL_INTERNAL(simd_min)
MSL_INTERNAL_BITS(simd_or)
MSL_INTERNAL(simd_prefix_exclusive_product)
MSL_INTERNAL(simd_prefix_exclusive_sum)
MSL_INTERNAL(simd_prefix_inclusive_product)
MSL_INTERNAL(simd_prefix_inclusive_sum)
MSL_INTERNAL(simd_product)
MSL_INTERNAL(simd_shuffle)
MSL_INTERNAL(simd_shuffle_and_fill_down)
MSL_INTERNAL(simd_shuffle_and_fill_up)
MSL_INTERNAL(simd_shuffle_down)
MSL_INTERNAL(simd_shuffle_rotate_down)
MSL_INTERNAL(simd_shuffle_rotate_up)
MSL_INTERNAL(simd_shuffle_up)
MSL_INTERNAL(simd_shuffle_xor)
MSL_INTERNAL(simd_sum)
MSL_INTERNAL_BITS(simd_xor)
MSL_FN float __metal_frexp(float x, int* exponent) {
  return frexp(x, *exponent);
}
MSL_FN ushort __metal_get_simdgroup_size(ushort) {
  return 32;
}
MSL_FN ushort __metal_get_thread_index_in_simdgroup(ushort, MSL_HERE) {
  return ushort(exchange<uint>(0, 50, line_, file_).lane);
}

}  // namespace metal
