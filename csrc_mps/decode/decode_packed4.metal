// The decode step's kernels for packed matrices of four bits.
#include <metal_stdlib>
#include "decode/packed_rows.metal.h"
using namespace metal;
using namespace torch_fused;

PACKED(f32, float, 4)
PACKED(f16, half, 4)
PACKED(bf16, bfloat, 4)
PACKED_ANY(4)
