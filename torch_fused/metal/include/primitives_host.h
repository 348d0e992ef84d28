// What the other headers need of the target, for the host's compiler without its own headers.
#pragma once

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define msl_copy __builtin_memcpy
#define MSL_CONSTEXPR_HALF constexpr

using size_t = __SIZE_TYPE__;
using ptrdiff_t = __PTRDIFF_TYPE__;

extern "C" {
float acosf(float);
float acoshf(float);
float asinf(float);
float asinhf(float);
float atanf(float);
float atanhf(float);
float ceilf(float);
float cosf(float);
float coshf(float);
float expf(float);
float exp2f(float);
float fabsf(float);
float floorf(float);
float logf(float);
float log2f(float);
float log10f(float);
float rintf(float);
float roundf(float);
float sinf(float);
float sinhf(float);
float sqrtf(float);
float tanf(float);
float tanhf(float);
float truncf(float);
float atan2f(float, float);
float copysignf(float, float);
float fdimf(float, float);
float fmaxf(float, float);
float fminf(float, float);
float fmodf(float, float);
float powf(float, float);
float fmaf(float, float, float);
float frexpf(float, int*);
float modff(float, float*);
int ilogbf(float);
double sin(double);
double cos(double);
double pow(double, double);
double fmod(double, double);
double ldexp(double, int);
}

namespace metal {

MSL_FN constexpr unsigned msl_bits(float f) {
  return __builtin_bit_cast(unsigned, f);
}
MSL_FN constexpr float msl_float(unsigned bits) {
  return __builtin_bit_cast(float, bits);
}

MSL_FN constexpr unsigned short msl_bfloat_bits(float f) {
  const unsigned bits = msl_bits(f);
  return f != f ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
MSL_FN constexpr float msl_bfloat_value(unsigned short bits) {
  return msl_float(unsigned(bits) << 16);
}
MSL_FN constexpr unsigned short msl_half_bits(float f) {
  const unsigned bits = msl_bits(f), magnitude = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 143u << 23) return sign | 0x7c00;
  if (magnitude < 113u << 23) return sign | (msl_bits(msl_float(magnitude) + 0.5f) - msl_bits(0.5f));  // subnormal
  return sign | ((magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13);
}
MSL_FN constexpr float msl_half_value(unsigned short bits) {
  const unsigned magnitude = bits & 0x7fff, sign = unsigned(bits & 0x8000) << 16;
  const unsigned finite = msl_bits(msl_float(magnitude << 13) * 0x1p112f);
  return msl_float(sign | finite | (magnitude >= 0x7c00 ? 0x7f800000 : 0));
}

}  // namespace metal
