// A step for x86-64 with AVX2.
#include "instruction_set.h"

#ifdef TORCH_FUSED_X86_DISPATCH
#pragma GCC target("arch=x86-64-v3")
#define TORCH_FUSED_AVX2  // instructions of 32 bytes, and those that convert float16
#define TORCH_FUSED_TARGET avx2
#include "step.h"
#endif
