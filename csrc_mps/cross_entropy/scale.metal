// A gradient times the number that comes in.
#include <metal_stdlib>
#include "common/kernel.metal.h"
#include "common/pack.metal.h"
#include "cross_entropy/scale_params.h"
using namespace metal;
using namespace torch_fused;

// In place. The number is 1 if nothing was computed from the loss: then there is nothing to do.
template <typename T, int W>
[[kernel, max_total_threads_per_threadgroup(256)]]
void scale(device T* x [[buffer(0)]], device const float* factor [[buffer(1)]], constant ScaleParams& p [[buffer(2)]],
           uint group [[threadgroup_position_in_grid]], uint thread_id [[thread_position_in_threadgroup]]) {
  const float by = *factor;
  if (by == 1.0f) return;
  const uint chunk = SCALE_THREADS * SCALE_PACKS * W;
  const long begin = long(group) * chunk;
  const uint count = uint(min(p.numel - begin, long(chunk)));
  device T* in = x + begin;
  Pack<T, W> packs[SCALE_PACKS];
#pragma unroll
  for (uint i = 0; i < SCALE_PACKS; i++) packs[i].load(in, (i * SCALE_THREADS + thread_id) * W, count, p.aligned);
#pragma unroll
  for (uint i = 0; i < SCALE_PACKS; i++) {
    float values[W];
    packs[i].unpack(values);
#pragma unroll
    for (int j = 0; j < W; j++) values[j] *= by;
    store_columns<W>(in, (i * SCALE_THREADS + thread_id) * W, count, p.aligned, values);
  }
}

#define SCALE(name, T, W) KERNEL("scale_" #name, scale<T, W>)
SCALE(f32, float, 4)
SCALE(bf16, bfloat, 8)
