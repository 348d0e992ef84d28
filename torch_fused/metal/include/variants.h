// Metal's precise:: and fast:: variants, of single precision: a half or bfloat converts to float and gets a float. Both
// are the same here, and a source may add functions to either.
#pragma once

namespace metal {

template <class A>
MSL_FN auto msl_single(A& a) -> conditional_t<is_half_type<remove_cv_t<A>>::v, float, A&> {
  return a;
}

#define MSL_VARIANT(NAME)                                                        \
  template <class... A>                                                          \
  MSL_FN auto NAME(A&&... a) -> decltype(metal::NAME(metal::msl_single(a)...)) { \
    return metal::NAME(metal::msl_single(a)...);                                 \
  }
#define MSL_VARIANTS      \
  MSL_VARIANT(acos)       \
  MSL_VARIANT(acosh)      \
  MSL_VARIANT(asin)       \
  MSL_VARIANT(asinh)      \
  MSL_VARIANT(atan)       \
  MSL_VARIANT(atan2)      \
  MSL_VARIANT(atanh)      \
  MSL_VARIANT(ceil)       \
  MSL_VARIANT(clamp)      \
  MSL_VARIANT(copysign)   \
  MSL_VARIANT(cos)        \
  MSL_VARIANT(cosh)       \
  MSL_VARIANT(cospi)      \
  MSL_VARIANT(distance)   \
  MSL_VARIANT(divide)     \
  MSL_VARIANT(exp)        \
  MSL_VARIANT(exp10)      \
  MSL_VARIANT(exp2)       \
  MSL_VARIANT(fabs)       \
  MSL_VARIANT(fdim)       \
  MSL_VARIANT(floor)      \
  MSL_VARIANT(fma)        \
  MSL_VARIANT(fmax)       \
  MSL_VARIANT(fmax3)      \
  MSL_VARIANT(fmedian3)   \
  MSL_VARIANT(fmin)       \
  MSL_VARIANT(fmin3)      \
  MSL_VARIANT(fmod)       \
  MSL_VARIANT(fract)      \
  MSL_VARIANT(frexp)      \
  MSL_VARIANT(ilogb)      \
  MSL_VARIANT(ldexp)      \
  MSL_VARIANT(length)     \
  MSL_VARIANT(log)        \
  MSL_VARIANT(log10)      \
  MSL_VARIANT(log2)       \
  MSL_VARIANT(max)        \
  MSL_VARIANT(max3)       \
  MSL_VARIANT(median3)    \
  MSL_VARIANT(min)        \
  MSL_VARIANT(min3)       \
  MSL_VARIANT(mix)        \
  MSL_VARIANT(modf)       \
  MSL_VARIANT(nextafter)  \
  MSL_VARIANT(normalize)  \
  MSL_VARIANT(pow)        \
  MSL_VARIANT(powr)       \
  MSL_VARIANT(rint)       \
  MSL_VARIANT(round)      \
  MSL_VARIANT(rsqrt)      \
  MSL_VARIANT(saturate)   \
  MSL_VARIANT(sign)       \
  MSL_VARIANT(sin)        \
  MSL_VARIANT(sincos)     \
  MSL_VARIANT(sinh)       \
  MSL_VARIANT(sinpi)      \
  MSL_VARIANT(smoothstep) \
  MSL_VARIANT(sqrt)       \
  MSL_VARIANT(step)       \
  MSL_VARIANT(tan)        \
  MSL_VARIANT(tanh)       \
  MSL_VARIANT(tanpi)      \
  MSL_VARIANT(trunc)
namespace precise {
MSL_VARIANTS
}
namespace fast {
MSL_VARIANTS
}

}  // namespace metal
