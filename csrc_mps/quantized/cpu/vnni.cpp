// Packed rows for x86-64 with AVX-512 and its integer dot products.
#include "instruction_set.h"

#ifdef TORCH_FUSED_X86_DISPATCH
#pragma GCC target("arch=x86-64-v4,avx512vnni,prefer-vector-width=512")
#define TORCH_FUSED_AVX512  // instructions that convert sixteen elements
#define TORCH_FUSED_F16C    // instructions that convert float16
#define TORCH_FUSED_AVX2    // instructions of 32 bytes; g++ defines no macro for the pragma
#define TORCH_FUSED_VNNI    // sums of four products of bytes
#define TORCH_FUSED_TARGET vnni
#include "multiply.h"
#endif
