// Attention of the new tokens: a threadgroup a key/value head and chunk of a sequence's context, for all query heads that
// share it. Placing comes with it: queries and keys are normed and rotated, the new keys and values appended.
//
// LANES lanes, of eight columns each, hold a key, so a simdgroup reads several keys at once. Scores are in octaves.
#include <metal_stdlib>
#include "common/kernel.metal.h"
#include "common/pack.metal.h"
#include "decode/decode_params.h"
#include "decode/product.metal.h"
#include "decode/vectors.metal.h"
using namespace metal;
using namespace torch_fused;

constant constexpr int W = kLaneColumns, SIMDGROUPS = kAttentionSimdgroups;

// Elements lane, lane + 32, ... of a vector of `count`, and `fill` past its end.
template <typename T, int N, bool WHOLE>
inline void load_strided(device const ushort* vector, uint format, ulong first, uint count, uint lane, float fill,
                         thread float* x) {
#pragma unroll
  for (int i = 0; i < N; i++) {
    const uint d = lane + 32 * i;
    x[i] = d < count ? vector_at<T, WHOLE>(vector, format, first + d) : fill;
  }
}

// The cosines and sines of one token's position, as a lane holds them.
template <int N>
struct Angles {
  float cos[N], sin[N];
  uint token;
};

template <typename T, int N, bool WHOLE>
inline void load_angles(thread Angles<N>& angles, uint token, device const ushort* cos, device const ushort* sin,
                        device const long* positions, uint lane, constant AttentionParams& p) {
  const ulong row = ulong(clamp(positions[token], 0L, long(p.positions) - 1)) * p.rotary_dim;
  load_strided<T, N, WHOLE>(cos, p.table_format, row, p.rotary_dim, lane, 1.0f, angles.cos);
  load_strided<T, N, WHOLE>(sin, p.table_format, row, p.rotary_dim, lane, 0.0f, angles.sin);
  angles.token = token;
}

// A head normed, rotated half-split and handed to `store`, by a whole simdgroup.
template <int N, typename Store>
inline void place_head(device const float* head, bool normed, thread const float* norm, thread const Angles<N>& angles,
                       constant AttentionParams& p, uint lane, Store store) {
  float x[N];
#pragma unroll
  for (int i = 0; i < N; i++) x[i] = lane + 32 * i < p.head_dim ? head[lane + 32 * i] : 0.0f;
  if (normed) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < N; i++) squares = fma(x[i], x[i], squares);
    const float scale = rsqrt(simd_sum(squares) / float(p.head_dim) + p.eps);
#pragma unroll
    for (int i = 0; i < N; i++) x[i] *= scale * (norm[i] + p.norm_offset);
  }
  const uint half_dim = p.rotary_dim / 2;
#pragma unroll
  for (int i = 0; i < N; i++) {
    const uint d = lane + 32 * i;
    float other = 0.0f;  // the element that this one is rotated with
    if (half_dim == 16 * N) {
      other = x[i < N / 2 ? i + N / 2 : i - N / 2];
    } else {
      const uint partner = d < half_dim ? d + half_dim : d - half_dim;
#pragma unroll
      for (int k = 0; k < N; k++) {
        const float held = simd_shuffle(x[k], ushort(partner % 32));
        other = partner / 32 == uint(k) ? held : other;
      }
    }
    const float rotated = fma(d < half_dim ? -other : other, angles.sin[i], x[i] * angles.cos[i]);
    if (d < p.head_dim) store.put(d, d < p.rotary_dim ? rotated : x[i]);
  }
}

template <typename T>
struct CacheStore {
  device T* to;
  void put(uint d, float x) const { to[d] = T(x); }
};

struct QueryStore {
  threadgroup float* to;
  float scaling;
  void put(uint d, float x) const { to[d] = x * scaling; }
};

// U scores, summed over LANES lanes: a lane gets that of score lane % U. `scores` is used up.
template <int LANES, int U>
inline float sum_of_lanes(thread float* scores, uint lane) {
  share_sums<U>(scores, lane);
  float sum = scores[0];
#pragma unroll
  for (int distance = U; distance < LANES; distance *= 2) sum += simd_shuffle_xor(sum, ushort(distance));
  return sum;
}

// The columns from `column` on of U keys and values a group of lanes, from slot `first` to the last one before `end`.
template <int KEYS, bool WHOLE, typename T, int U>
inline void load_slots(thread Pack<T, W> (&key)[U], thread Pack<T, W> (&value)[U], device const T* keys,
                       device const T* values, uint first, uint end, uint column, uint lane_group,
                       constant AttentionParams& p) {
#pragma unroll
  for (int u = 0; u < U; u++) {
    const ulong slot = min(first + u * KEYS + lane_group, end - 1);
    load_pack<T, WHOLE>(keys + slot * p.keys_slot, column, p.head_dim, key[u]);
    load_pack<T, WHOLE>(values + slot * p.values_slot, column, p.head_dim, value[u]);
  }
}

// Queries share a threadgroup's simdgroups: a team of them has one, and its members share the chunk's slots. U keys at
// once a group of lanes. WHOLE: a head is LANES packs.
template <typename T, int LANES, int U, bool WHOLE>
[[kernel, max_total_threads_per_threadgroup(512)]]
void decode_attention(device const float* qkv [[buffer(0)]], device T* keys [[buffer(1)]],
                      device T* values [[buffer(2)]], device const ushort* q_norm [[buffer(3)]],
                      device const ushort* k_norm [[buffer(4)]], device const ushort* cos [[buffer(5)]],
                      device const ushort* sin [[buffer(6)]], device const long* positions [[buffer(7)]],
                      device const long* starts [[buffer(8)]], device float* attended [[buffer(9)]],
                      device float2* stats [[buffer(10)]], constant AttentionParams& p [[buffer(11)]],
                      uint group [[threadgroup_position_in_grid]], uint thread_id [[thread_position_in_threadgroup]],
                      uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  constexpr int DIM = LANES * W, KEYS = 32 / LANES;  // columns of a head, and keys of a simdgroup
  threadgroup float queries[kMostTeams * DIM];
  threadgroup float merged[SIMDGROUPS * DIM];
  threadgroup float2 merged_stats[SIMDGROUPS];
  constexpr int N = DIM / 32;
  const uint chunk = group % p.chunks, kv_head = group / p.chunks % p.kv_heads;
  const uint batch = group / p.chunks / p.kv_heads;
  const uint group_heads = p.heads / p.kv_heads, projected = (p.heads + 2 * p.kv_heads) * p.head_dim;
  device T* head_keys =
      keys + long(batch) * p.keys_batch + long(kv_head) * p.keys_head - long(p.dropped) * p.keys_slot;
  device T* head_values =
      values + long(batch) * p.values_batch + long(kv_head) * p.values_head - long(p.dropped) * p.values_slot;
  // The first token's angles, and the norms, are under way before the queries and keys are there.
  float q_scale[N], k_scale[N];
  load_strided<T, N, WHOLE>(q_norm, p.q_norm_format, 0, p.flags & kQueryNorm ? p.head_dim : 0, lane, 0.0f, q_scale);
  load_strided<T, N, WHOLE>(k_norm, p.k_norm_format, 0, p.flags & kKeyNorm ? p.head_dim : 0, lane, 0.0f, k_scale);
  Angles<N> angles;
  load_angles<T, N, WHOLE>(angles, batch * p.steps, cos, sin, positions, lane, p);

  // The slots of this chunk; the last one has the new tokens.
  const uint start = p.flags & kStarts ? uint(clamp(starts[batch], 0L, long(p.length))) : 0;
  const uint first = p.window > 0 && p.length + 1 > p.window ? max(start, p.length + 1 - p.window) : start;
  const uint held = max(p.length, first) - first, each = held / p.chunks, more = held % p.chunks;
  const bool newest_chunk = chunk == p.chunks - 1;
  const uint begin = first + chunk * each + min(chunk, more);
  const uint end = newest_chunk ? p.length + p.steps : begin + each + (chunk < more ? 1 : 0);
  // So are the first keys and values, if earlier steps have appended them.
  const uint column = lane % LANES * W, key_group = lane / LANES;
  const uint teams = p.teams, members = SIMDGROUPS / teams;
  const uint team = simdgroup / members, member = simdgroup % members, first_slot = begin + member * KEYS * U;
  Pack<T, W> key[U], value[U];
  bool loaded = first_slot + KEYS * U <= p.length;
  if (loaded) load_slots<KEYS, WHOLE>(key, value, head_keys, head_values, first_slot, end, column, key_group, p);
  previous_launch_done(lane);
  if (newest_chunk) {
    for (uint step = simdgroup; step < p.steps; step += SIMDGROUPS) {
      const uint token = batch * p.steps + step;
      device const float* key = qkv + ulong(token) * projected + (p.heads + kv_head) * p.head_dim;
      device const float* value = key + p.kv_heads * p.head_dim;
      const CacheStore<T> store = {head_keys + ulong(p.length + step) * p.keys_slot};
      if (token != angles.token) load_angles<T, N, WHOLE>(angles, token, cos, sin, positions, lane, p);
      place_head<N>(key, p.flags & kKeyNorm, k_scale, angles, p, lane, store);
      device T* to = head_values + ulong(p.length + step) * p.values_slot;
      for (uint d = lane; d < p.head_dim; d += 32) to[d] = T(value[d]);
    }
  }

  const uint count = group_heads * p.steps;
  for (uint first_query = 0; first_query < count; first_query += teams) {
    const uint q = SIMDGROUPS - 1 - simdgroup;  // the first simdgroups have the new keys to place
    if (q < teams) {
      const uint query = min(first_query + q, count - 1), token = batch * p.steps + query / group_heads;
      device const float* from =
          qkv + ulong(token) * projected + (kv_head * group_heads + query % group_heads) * p.head_dim;
      const QueryStore store = {queries + q * DIM, p.scaling};
      if (!WHOLE) {
        for (uint d = p.head_dim + lane; d < DIM; d += 32) queries[q * DIM + d] = 0.0f;
      }
      if (token != angles.token) load_angles<T, N, WHOLE>(angles, token, cos, sin, positions, lane, p);
      place_head<N>(from, p.flags & kQueryNorm, q_scale, angles, p, lane, store);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);

    // The slots that the query sees, from `low` to `high`.
    const uint query = min(first_query + team, count - 1), step = query / group_heads;
    const uint high = min(end, p.length + step + 1);
    const uint low = p.window > 0 && p.length + step + 1 > p.window ? p.length + step + 1 - p.window : 0;
    float x[W], seen[W], largest = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int j = 0; j < W; j++) {
      x[j] = queries[team * DIM + column + j];
      seen[j] = 0.0f;
    }
    for (uint base = first_slot; base < end; base += members * KEYS * U) {
      if (!loaded) load_slots<KEYS, WHOLE>(key, value, head_keys, head_values, base, end, column, key_group, p);
      loaded = false;
      float scores[U];
#pragma unroll
      for (int u = 0; u < U; u++) {
        scores[u] = 0.0f;
#pragma unroll
        for (int j = 0; j < W; j++) scores[u] = fma(key[u].get(j), x[j], scores[u]);
      }
      // A lane has the score of one slot.
      float score = sum_of_lanes<LANES, U>(scores, lane);
      if (p.softcap > 0.0f) score = p.softcap * tanh(score / p.softcap);
      const uint slot = base + lane % U * KEYS + key_group;
      if (slot < low || slot >= high) score = -INFINITY;
      const float most = max(largest, simd_max(score));
      const float middle = most == -INFINITY ? 0.0f : most;  // nothing seen yet
      const float keep = exp2(largest - middle), weight = exp2(score - middle);
      largest = most;
      sum = fma(sum, keep, weight);
#pragma unroll
      for (int j = 0; j < W; j++) seen[j] *= keep;
#pragma unroll
      for (int u = 0; u < U; u++) {
        const float its_weight = simd_shuffle(weight, ushort(key_group * LANES + u));
        if (its_weight == 0.0f) continue;  // a slot that is not attended may hold anything
#pragma unroll
        for (int j = 0; j < W; j++) seen[j] = fma(value[u].get(j), its_weight, seen[j]);
      }
    }

    // What the groups of lanes have seen, then the members of a team, as one.
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      if (distance < U || distance >= LANES) sum += simd_shuffle_xor(sum, ushort(distance));
    }
#pragma unroll
    for (int distance = LANES; distance < 32; distance *= 2) {
#pragma unroll
      for (int j = 0; j < W; j++) seen[j] += simd_shuffle_xor(seen[j], ushort(distance));
    }
    if (key_group == 0) {
#pragma unroll
      for (int j = 0; j < W; j++) merged[simdgroup * DIM + column + j] = seen[j];
    }
    if (lane == 0) merged_stats[simdgroup] = float2(largest, sum);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = thread_id; i < teams * DIM; i += 32 * SIMDGROUPS) {
      const uint query = first_query + i / DIM, d = i % DIM, room = i / DIM * members;  // of the team's first member
      float2 all = merged_stats[room];
      float total = merged[room * DIM + d];
      for (uint s = 1; s < members; s++) {
        const float2 part = merged_stats[room + s];
        const float most = max(all.x, part.x), middle = most == -INFINITY ? 0.0f : most;
        const float keep = exp2(all.x - middle), weight = exp2(part.x - middle);
        all = float2(most, fma(all.y, keep, part.y * weight));
        total = fma(total, keep, merged[(room + s) * DIM + d] * weight);
      }
      const uint token = batch * p.steps + query / group_heads;
      const ulong place = (ulong(token) * p.heads + kv_head * group_heads + query % group_heads) * p.chunks + chunk;
      if (p.chunks == 1) total /= all.y;
      if (query < count && d < p.head_dim) attended[place * p.head_dim + d] = total;
      if (query < count && d == 0) stats[place] = all;
    }
  }
}

#define ATTENTION(name, T)                                              \
  KERNEL("decode_attention_" #name, decode_attention<T, 32, 1, false>)  \
  KERNEL("decode_attention_64_" #name, decode_attention<T, 8, kKeysAtOnce, true>) \
  KERNEL("decode_attention_128_" #name, decode_attention<T, 16, kKeysAtOnce, true>)
ATTENTION(f32, float)
ATTENTION(f16, half)
ATTENTION(bf16, bfloat)
