// Packed rows for the build's default instruction set: SSE2, or NEON.
#include "instruction_set.h"

#define TORCH_FUSED_TARGET baseline
#include "multiply.h"
