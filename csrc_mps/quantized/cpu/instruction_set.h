// Included by the sources of these loops before they select an instruction set: the selection must not affect the
// functions of other headers, which the linker shares between all sources.
#pragma once

// Fused multiply-adds where the machine has them.
#pragma GCC optimize("fp-contract=fast")
#pragma STDC FP_CONTRACT ON
// As fast as with O3, and compiled in less time.
#pragma GCC optimize("O2", "tree-vectorize", "vect-cost-model=dynamic")

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../../common/convert.h"
#include "../../common/prefetch.h"
#include "packed.h"

#ifdef TORCH_FUSED_X86_DISPATCH
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif
