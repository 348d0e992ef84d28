// Copies the keys and values of new tokens into a cache, one unit per thread. A unit is a pack of 16 bytes if every
// operand's layout allows it, else an element. Bytes are copied, so one kernel serves all dtypes of a size.
#include <metal_stdlib>
#include "common/kernel.metal.h"
#include "kv_cache/kv_append_params.h"
using namespace metal;
using namespace torch_fused;

// Units from one index to the next.
template <typename U>
inline void copy_unit(device U* to, device const U* from, constant KvCopy& copy, uint heads, uint tokens, uint index) {
  const uint row = index / copy.width, unit = index % copy.width;
  const uint head_row = row / tokens, token = row % tokens;
  const uint batch = head_row / heads, head = head_row % heads;
  to[batch * copy.to.batch + head * copy.to.head + token * copy.to.token + unit * copy.to.unit] =
      from[batch * copy.from.batch + head * copy.from.head + token * copy.from.token + unit * copy.from.unit];
}

// `keys` and `values` start at the first token written.
template <typename U>
[[kernel, max_total_threads_per_threadgroup(256)]]
void kv_append(device U* keys [[buffer(0)]], device const U* new_keys [[buffer(1)]], device U* values [[buffer(2)]],
               device const U* new_values [[buffer(3)]], constant KvAppendParams& p [[buffer(4)]],
               uint group [[threadgroup_position_in_grid]], uint thread_id [[thread_position_in_threadgroup]],
               uint threads [[threads_per_threadgroup]]) {
  const ulong index = ulong(group) * threads + thread_id;
  if (index < p.keys.units) {
    copy_unit(keys, new_keys, p.keys, p.heads, p.tokens, uint(index));
  } else if (index - p.keys.units < p.values.units) {
    copy_unit(values, new_values, p.values, p.heads, p.tokens, uint(index - p.keys.units));
  }
}

#define KV_APPEND(bytes, U) KERNEL("kv_append_" #bytes, kv_append<U>)
KV_APPEND(1, uchar)
KV_APPEND(2, ushort)
KV_APPEND(4, uint)
KV_APPEND(8, uint2)
KV_APPEND(16, uint4)
