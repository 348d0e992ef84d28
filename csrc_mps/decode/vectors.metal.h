// Loads of the decode step's kernels: fast if everything has one type and is aligned (WHOLE), else generic.
#pragma once
#include <metal_stdlib>
#include "common/pack.metal.h"
#include "decode/decode_params.h"
using namespace metal;
using namespace torch_fused;

// The launches of a step follow each other so closely that on NVIDIA a kernel may begin before those ahead of it are
// done: cuda.h has the overload for uint, which waits. Before it calls this, a kernel reads the model's own tensors and
// what was in the cache before the step; after it, anything that an earlier launch of the step has written, or reads.
template <typename Lane>
inline void previous_launch_done(Lane) {}

// Element i of a norm, a bias or a table of angles.
template <typename T, bool WHOLE>
inline float vector_at(device const ushort* vector, uint format, ulong i) {
  if (WHOLE) return float(((device const T*)vector)[i]);
  if (format == kFloat32) return as_type<float>(uint(vector[2 * i]) | uint(vector[2 * i + 1]) << 16);
  return format == kFloat16 ? float(as_type<half>(vector[i])) : float(as_type<bfloat>(vector[i]));
}

// Weights, which a step reads once. cuda.h has the overloads for NVIDIA, where they leave the cache to the vectors.
template <typename Words>
inline Words read_once(device const Words* from) {
  return *from;
}

// A pack of a row from `column` on, zero past the end. WHOLE: no pack crosses it. ONCE: it is read once.
template <typename T, bool WHOLE, bool ONCE = false, int N>
inline void load_pack(device const T* row, uint column, uint cols, thread Pack<T, N>& pack) {
  if (!WHOLE) {
    pack.load(row, column, cols, false);
  } else {
    device const uint4* from = (device const uint4*)(row + column);
#pragma unroll
    for (uint i = 0; i < N * sizeof(T) / 16; i++) {
      const uint4 raw = column >= cols ? uint4(0u) : ONCE ? read_once(from + i) : from[i];
      pack.words[4 * i] = raw.x;
      pack.words[4 * i + 1] = raw.y;
      pack.words[4 * i + 2] = raw.z;
      pack.words[4 * i + 3] = raw.w;
    }
  }
}
