// What the flags of a launch say; rms_norm_launch.cpp has the same names.
#pragma once
#include <metal_stdlib>
using namespace metal;

constant constexpr uint ALIGNED = 1;       // every row of every operand starts at 16 bytes
constant constexpr uint HAS_RESIDUAL = 2;  // forward: normalise input + residual; backward: that sum has a gradient too
constant constexpr uint HAS_WEIGHT = 4;
constant constexpr uint LLAMA = 8;         // round before the weight, as Llama's RMSNorm does
constant constexpr uint GRAD_WEIGHT = 16;  // the weight needs a gradient
