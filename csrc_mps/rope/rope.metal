// Rotary position embedding of queries and keys. A head is two halves, (a, b), and pass-through dimensions after them:
// (a, b) -> (a * cos - b * sin, b * cos + a * sin), each half with its own half of the tables.
#include <metal_stdlib>
#include "common/kernel.metal.h"
#include "common/pack.metal.h"
#include "rope/rope_params.h"
using namespace metal;
using namespace torch_fused;

// `negate` is the sign of the sine, which is exact.
template <typename T, int W>
inline void rotate(thread const float* x, thread const float* other, thread const float* c, thread const float* s,
                   bool negate, bool llama, thread float* y) {
#pragma unroll
  for (int j = 0; j < W; j++) {
    const float straight = x[j] * c[j];
    const float crossed = (negate ? -other[j] : other[j]) * s[j];
    y[j] = llama ? float(T(straight)) + float(T(crossed)) : straight + crossed;
  }
}

// One threadgroup a token; a thread takes a pack of W of each half of a head, or W pass-through values.
template <typename T, int W>
[[kernel, max_total_threads_per_threadgroup(512)]]
void rope(device const T* q [[buffer(0)]], device const T* k [[buffer(1)]], device const T* cosines [[buffer(2)]],
          device const T* sines [[buffer(3)]], device T* q_out [[buffer(4)]], device T* k_out [[buffer(5)]],
          constant RopeParams& p [[buffer(6)]], uint group [[threadgroup_position_in_grid]],
          uint thread_id [[thread_position_in_threadgroup]], uint threads [[threads_per_threadgroup]]) {
  const long batch = group / p.tokens;
  const long token = group % p.tokens;
  device const T* cos_row = cosines + batch * p.cos_batch + token * p.cos_token;
  device const T* sin_row = sines + batch * p.sin_batch + token * p.sin_token;
  const uint half_packs = (p.half_dim + W - 1) / W;
  const uint passed = p.head_dim - 2 * p.half_dim;
  const uint packs = half_packs + (passed + W - 1) / W;
  const bool aligned = p.flags & ALIGNED;
  const bool llama = p.flags & LLAMA;
  const bool transposed = p.flags & TRANSPOSED;
  for (uint unit = thread_id; unit < p.heads * packs; unit += threads) {
    const uint head = unit / packs;
    const uint pack = unit % packs;
    const bool is_q = head < p.q_heads;
    constant RopeHeadStrides& s = is_q ? p.q : p.k;
    const long h = is_q ? head : head - p.q_heads;
    device const T* from = (is_q ? q : k) + batch * s.from_batch + token * s.from_token + h * s.from_head;
    device T* to = (is_q ? q_out : k_out) + batch * s.to_batch + token * s.to_token + h * s.to_head;
    if (pack < half_packs) {
      const uint column = pack * W;
      const uint half_dim = p.half_dim;
      Pack<T, W> packs[6];
      packs[0].load(from, column, half_dim, aligned);
      packs[1].load(from + half_dim, column, half_dim, aligned);
      packs[2].load(cos_row, column, half_dim, aligned);
      packs[3].load(cos_row + half_dim, column, half_dim, aligned);
      // The transposed rotation takes each half's sine from the other half.
      packs[4].load(sin_row + (transposed ? half_dim : 0), column, half_dim, aligned);
      packs[5].load(sin_row + (transposed ? 0 : half_dim), column, half_dim, aligned);
      float a[W], b[W], cos_a[W], cos_b[W], sin_a[W], sin_b[W], y[W];
      packs[0].unpack(a);
      packs[1].unpack(b);
      packs[2].unpack(cos_a);
      packs[3].unpack(cos_b);
      packs[4].unpack(sin_a);
      packs[5].unpack(sin_b);
      rotate<T, W>(a, b, cos_a, sin_a, !transposed, llama, y);
      store_columns<W>(to, column, half_dim, aligned, y);
      rotate<T, W>(b, a, cos_b, sin_b, transposed, llama, y);
      store_columns<W>(to + half_dim, column, half_dim, aligned, y);
    } else {
      const uint column = (pack - half_packs) * W;
      float x[W];
      load_columns<W>(from + 2 * p.half_dim, column, passed, aligned, x);
      store_columns<W>(to + 2 * p.half_dim, column, passed, aligned, x);
    }
  }
}

#define ROPE(name, T, W) KERNEL("rope_" #name, rope<T, W>)
ROPE(f32, float, 4)
ROPE(f16, half, 8)
ROPE(bf16, bfloat, 8)
