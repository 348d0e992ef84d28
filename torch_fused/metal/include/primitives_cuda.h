// What standard.h needs of the target, for CUDA.
#pragma once

#define INFINITY __builtin_bit_cast(float, 0x7f800000)  // 1.0f / 0.0f is computed at run time
#define NAN __builtin_bit_cast(float, 0x7fc00000)
#define msl_copy memcpy
#define MSL_CONSTEXPR_HALF MSL_FN
#define msl_popcount __popc
#define msl_clz __clz
#define msl_rsqrt ::rsqrtf

MSL_FN unsigned short msl_half_bits(float f) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
  return bits;
}
MSL_FN float msl_half_value(unsigned short bits) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
}
MSL_FN unsigned short msl_bfloat_bits(float f) {
  unsigned short bits;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(f));
#else
  const unsigned u = __float_as_uint(f);
  bits = f != f ? 0x7fff : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
#endif
  return bits;
}
