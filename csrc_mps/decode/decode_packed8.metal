// The decode step's kernels for packed matrices of eight bits.
#include <metal_stdlib>
#include "decode/packed_rows.metal.h"
using namespace metal;
using namespace torch_fused;

PACKED(f32, float, 8)
PACKED(f16, half, 8)
PACKED(bf16, bfloat, 8)
PACKED_ANY(8)
