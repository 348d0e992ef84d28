// What standard.h needs of the target, for the host's compiler without its own headers.
#pragma once

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define msl_copy __builtin_memcpy
#define msl_popcount __builtin_popcount
#define msl_rsqrt(x) (1.0f / __builtin_sqrtf(x))

using size_t = __SIZE_TYPE__;
using ptrdiff_t = __PTRDIFF_TYPE__;

extern "C" {
float expf(float);
float exp2f(float);
float logf(float);
float log2f(float);
float sqrtf(float);
float sinf(float);
float cosf(float);
float tanhf(float);
float floorf(float);
float ceilf(float);
float rintf(float);
float roundf(float);
float truncf(float);
float fabsf(float);
float powf(float, float);
float fmaxf(float, float);
float fminf(float, float);
float fmaf(float, float, float);
}

MSL_FN int msl_clz(unsigned x) {
  return x ? __builtin_clz(x) : 32;
}

MSL_FN unsigned msl_bits(float f) {
  unsigned bits;
  __builtin_memcpy(&bits, &f, sizeof(bits));
  return bits;
}
MSL_FN float msl_float(unsigned bits) {
  float f;
  __builtin_memcpy(&f, &bits, sizeof(f));
  return f;
}

MSL_FN unsigned short msl_bfloat_bits(float f) {
  const unsigned bits = msl_bits(f);
  return f != f ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
MSL_FN unsigned short msl_half_bits(float f) {
  const unsigned bits = msl_bits(f), magnitude = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 143u << 23) return sign | 0x7c00;
  if (magnitude < 113u << 23) return sign | (msl_bits(msl_float(magnitude) + 0.5f) - msl_bits(0.5f));  // subnormal
  return sign | ((magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13);
}
MSL_FN float msl_half_value(unsigned short bits) {
  const unsigned magnitude = bits & 0x7fff, sign = unsigned(bits & 0x8000) << 16;
  const unsigned finite = msl_bits(msl_float(magnitude << 13) * 0x1p112f);
  return msl_float(sign | finite | (magnitude >= 0x7c00 ? 0x7f800000 : 0));
}
