// Packed rows for the instruction set that the build has anyway: SSE2, or NEON.
#include "instruction_set.h"

#define TORCH_FUSED_TARGET baseline
#include "multiply.h"
