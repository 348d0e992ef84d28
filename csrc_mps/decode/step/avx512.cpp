// A step for x86-64 with AVX-512.
#include "instruction_set.h"

#ifdef TORCH_FUSED_X86_DISPATCH
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define TORCH_FUSED_AVX512  // instructions that convert sixteen elements; g++ defines no macro for the pragma
#define TORCH_FUSED_TARGET avx512
#include "step.h"
#endif
