// Attention of the new tokens: a threadgroup a key/value head and chunk of a sequence's context, for all query heads that
// share it. Placing comes with it: queries and keys are normed and rotated, the new keys and values appended.
//
// LANES lanes, of eight columns each, hold a key, so a simdgroup reads several keys at once. Scores are in octaves.
#include <metal_stdlib>
#include "common/kernel.metal.h"
#include "common/pack.metal.h"
#include "decode/decode_params.h"
#include "decode/vectors.metal.h"
using namespace metal;
using namespace torch_fused;

constant constexpr int W = kLaneColumns;
constant constexpr int SIMDGROUPS = kAttentionSimdgroups, NQ = kTeamQueries, MOST_TEAMS = 4;

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

// Queries share a threadgroup's simdgroups: a team of them has NQ queries, and its members share the chunk's slots. U
// keys at once a group of lanes. WHOLE: a head is LANES packs.
template <typename T, int LANES, int U, bool WHOLE>
[[kernel, max_total_threads_per_threadgroup(256)]]
void decode_attention(device const float* qkv [[buffer(0)]], device T* keys [[buffer(1)]],
                      device T* values [[buffer(2)]], device const ushort* q_norm [[buffer(3)]],
                      device const ushort* k_norm [[buffer(4)]], device const ushort* cos [[buffer(5)]],
                      device const ushort* sin [[buffer(6)]], device const long* positions [[buffer(7)]],
                      device const long* starts [[buffer(8)]], device float* attended [[buffer(9)]],
                      device float2* stats [[buffer(10)]], constant AttentionParams& p [[buffer(11)]],
                      uint group [[threadgroup_position_in_grid]], uint thread_id [[thread_position_in_threadgroup]],
                      uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  constexpr int DIM = LANES * W, KEYS = 32 / LANES;  // columns of a head, and keys of a simdgroup
  threadgroup float queries[MOST_TEAMS * NQ * DIM];
  threadgroup float merged[SIMDGROUPS * NQ * DIM];
  threadgroup float2 merged_stats[SIMDGROUPS * NQ];
  constexpr int N = DIM / 32;
  const uint chunk = group % p.chunks, kv_head = group / p.chunks % p.kv_heads;
  const uint batch = group / p.chunks / p.kv_heads;
  const uint group_heads = p.heads / p.kv_heads, projected = (p.heads + 2 * p.kv_heads) * p.head_dim;
  device T* head_keys = keys + long(batch) * p.keys_batch + long(kv_head) * p.keys_head - p.dropped * p.keys_slot;
  device T* head_values =
      values + long(batch) * p.values_batch + long(kv_head) * p.values_head - p.dropped * p.values_slot;
  // The first token's angles, and the norms, are under way before the queries and keys are there.
  float q_scale[N], k_scale[N];
  load_strided<T, N, WHOLE>(q_norm, p.q_norm_format, 0, p.flags & kQueryNorm ? p.head_dim : 0, lane, 0.0f, q_scale);
  load_strided<T, N, WHOLE>(k_norm, p.k_norm_format, 0, p.flags & kKeyNorm ? p.head_dim : 0, lane, 0.0f, k_scale);
  Angles<N> angles;
  load_angles<T, N, WHOLE>(angles, batch * p.steps, cos, sin, positions, lane, p);

  // The slots of this chunk; the last one has the new tokens.
  const long start = p.flags & kStarts ? clamp(starts[batch], 0L, p.length) : 0L;
  const long first = p.window > 0 ? max(start, p.length + 1 - p.window) : start;
  const long held = max(p.length - first, 0L);
  const long begin = first + held * chunk / p.chunks;
  const bool newest_chunk = chunk == p.chunks - 1;
  const long end = newest_chunk ? p.length + p.steps : first + held * (chunk + 1) / p.chunks;
  previous_launch_done(lane);
  if (newest_chunk) {
    for (uint step = simdgroup; step < p.steps; step += SIMDGROUPS) {
      const uint token = batch * p.steps + step;
      device const float* key = qkv + ulong(token) * projected + (p.heads + kv_head) * p.head_dim;
      device const float* value = key + p.kv_heads * p.head_dim;
      const CacheStore<T> store = {head_keys + (p.length + step) * p.keys_slot};
      if (token != angles.token) load_angles<T, N, WHOLE>(angles, token, cos, sin, positions, lane, p);
      place_head<N>(key, p.flags & kKeyNorm, k_scale, angles, p, lane, store);
      device T* to = head_values + (p.length + step) * p.values_slot;
      for (uint d = lane; d < p.head_dim; d += 32) to[d] = T(value[d]);
    }
  }

  const uint column = lane % LANES * W, key_group = lane / LANES;
  const uint count = group_heads * p.steps;
  const uint teams = count > 2 * NQ ? MOST_TEAMS : count > NQ ? 2 : 1, members = SIMDGROUPS / teams;
  const uint team = simdgroup / members, member = simdgroup % members, at_once = teams * NQ;
  for (uint first_query = 0; first_query < count; first_query += at_once) {
    for (uint q = SIMDGROUPS - 1 - simdgroup; q < at_once; q += SIMDGROUPS) {  // the first have the new keys to place
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

    float x[NQ][W], largest[NQ], sums[NQ], seen[NQ][W];
#pragma unroll
    for (int q = 0; q < NQ; q++) {
      largest[q] = -INFINITY;
      sums[q] = 0.0f;
#pragma unroll
      for (int j = 0; j < W; j++) {
        x[q][j] = queries[(team * NQ + q) * DIM + column + j];
        seen[q][j] = 0.0f;
      }
    }
    for (long base = begin + member * KEYS * U; base < end; base += members * KEYS * U) {
      Pack<T, W> key[U], value[U];
#pragma unroll
      for (int u = 0; u < U; u++) {
        const long slot = min(base + u * KEYS + key_group, end - 1);
        load_pack<T, WHOLE>(head_keys + slot * p.keys_slot, column, p.head_dim, key[u]);
        load_pack<T, WHOLE>(head_values + slot * p.values_slot, column, p.head_dim, value[u]);
      }
#pragma unroll
      for (int q = 0; q < NQ; q++) {
        const long newest = p.length + (first_query + team * NQ + q) / group_heads;
        float score[U], most = largest[q];
#pragma unroll
        for (int u = 0; u < U; u++) {
          score[u] = 0.0f;
#pragma unroll
          for (int j = 0; j < W; j++) score[u] = fma(key[u].get(j), x[q][j], score[u]);
#pragma unroll
          for (int distance = 1; distance < LANES; distance *= 2) score[u] += simd_shuffle_xor(score[u], distance);
          if (p.softcap > 0.0f) score[u] = p.softcap * tanh(score[u] / p.softcap);
          const long slot = base + u * KEYS + key_group;
          const bool visible = slot < end && slot <= newest && (p.window == 0 || slot > newest - p.window);
          score[u] = visible ? score[u] : -INFINITY;
          most = max(most, score[u]);
        }
        const float middle = most == -INFINITY ? 0.0f : most;  // nothing seen yet
        const float keep = exp2(largest[q] - middle);
        largest[q] = most;
        sums[q] *= keep;
#pragma unroll
        for (int j = 0; j < W; j++) seen[q][j] *= keep;
#pragma unroll
        for (int u = 0; u < U; u++) {
          const float weight = exp2(score[u] - middle);
          sums[q] += weight;
          if (weight == 0.0f) continue;  // a slot that is not attended may hold anything
#pragma unroll
          for (int j = 0; j < W; j++) seen[q][j] = fma(value[u].get(j), weight, seen[q][j]);
        }
      }
    }

    // What the groups of lanes have seen, then the members of a team, as one.
#pragma unroll
    for (int q = 0; q < NQ; q++) {
      float most = largest[q];
#pragma unroll
      for (int distance = LANES; distance < 32; distance *= 2) most = max(most, simd_shuffle_xor(most, distance));
      const float keep = most == -INFINITY ? 0.0f : exp2(largest[q] - most);
      float sum = sums[q] * keep;
#pragma unroll
      for (int distance = LANES; distance < 32; distance *= 2) sum += simd_shuffle_xor(sum, distance);
      const uint room = simdgroup * NQ + q;
#pragma unroll
      for (int j = 0; j < W; j++) {
        float part = seen[q][j] * keep;
#pragma unroll
        for (int distance = LANES; distance < 32; distance *= 2) part += simd_shuffle_xor(part, distance);
        if (key_group == 0) merged[room * DIM + column + j] = part;
      }
      if (lane == 0) merged_stats[room] = float2(most, sum);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = thread_id; i < at_once * DIM; i += 32 * SIMDGROUPS) {
      const uint q = i / DIM, query = first_query + q, d = i % DIM;
      const uint room = q / NQ * members * NQ + q % NQ;  // of the team's first member
      float2 all = merged_stats[room];
      for (uint s = 1; s < members; s++) all.x = max(all.x, merged_stats[room + s * NQ].x);
      const float middle = all.x == -INFINITY ? 0.0f : all.x;
      float total = 0.0f;
      all.y = 0.0f;
      for (uint s = 0; s < members; s++) {
        const float2 part = merged_stats[room + s * NQ];
        const float weight = exp2(part.x - middle);
        all.y = fma(part.y, weight, all.y);
        total = fma(merged[(room + s * NQ) * DIM + d], weight, total);
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
  KERNEL("decode_attention_64_" #name, decode_attention<T, 8, 4, true>) \
  KERNEL("decode_attention_128_" #name, decode_attention<T, 16, 4, true>)
ATTENTION(f32, float)
ATTENTION(f16, half)
ATTENTION(bf16, bfloat)
