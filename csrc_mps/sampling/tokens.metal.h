// What the kernels of sampling share: their parameters, tokens as integers in the sampling order, and tokens' weights.
#pragma once
#include <metal_stdlib>
#include "common/token_weight.h"
#include "sampling/sort.metal.h"
using namespace metal;
using namespace torch_fused;

struct SamplingParams {
  long row_stride;
  ulong seed;
  ulong offset;
  float scale;
  float top_k;
  float top_p;
  float min_p;
  uint vocabulary;
  uint slices;  // of a row
  uint flags;
};

constant constexpr uint SLICE = 2048;  // tokens that a threadgroup divides
constant constexpr uint PER_THREAD = 8;
constant constexpr uint SLICE_THREADS = SLICE / PER_THREAD;
constant constexpr uint BUCKETS = 256;
constant constexpr uint THREADS = 1024;      // that search a row
constant constexpr uint PLACES = 2;          // that each of them has in what is sorted
constant constexpr uint MOST_SORTED = PLACES * THREADS;
constant constexpr uint ROW_PARAMETERS = 1;  // flags: the filter of each row is in a buffer
constant constexpr uint STATE = 2;           // seed and offset are in a buffer

// A token is its key above its inverted index, so that the order is that of integers, descending. 0 is none.
constant constexpr uint INDEX_BITS = 20;
constant constexpr uint LAST_INDEX = (1u << INDEX_BITS) - 1u;

inline ulong make_token(uint key, uint index) {
  return key == 0u ? 0 : (ulong(key) << INDEX_BITS) + (LAST_INDEX - index);
}
inline uint token_key(ulong token) {
  return uint(token >> INDEX_BITS);
}
inline uint token_index(ulong token) {
  return LAST_INDEX - (uint(token) & LAST_INDEX);
}

struct Weigher {
  float maximum;
  float scale;

  // No token of the row is larger.
  ulong first() const { return make_token(order_key(as_type<uint>(maximum)), 0u); }

  ulong weight(ulong token) const {
    if (token == 0) return 0;
    return token_weight(steps_below(maximum, as_type<float>(key_bits(token_key(token))), scale));
  }
};

// From the largest keys of a row's slices; by each simdgroup.
inline Weigher row_weigher(device const uint* maxima, uint slices, float scale, uint lane) {
  uint largest = 0u;
  for (uint i = lane; i < slices; i += 32) largest = max(largest, maxima[i]);
  return {as_type<float>(key_bits(simd_max(largest))), scale};
}

// Values in a buffer nobody could check without waiting for the device: they are clamped.
inline TokenFilter row_filter(constant SamplingParams& p, device const float* row_parameters, uint row) {
  if (!(p.flags & ROW_PARAMETERS)) return token_filter(p.scale, p.top_k, p.top_p, p.min_p);
  device const float* values = row_parameters + 4 * row;
  const float scale = values[0] >= 0.0f ? values[0] : 0.0f;
  return token_filter(scale, clamp(values[1], 0.0f, 1048576.0f), clamp(values[2], 0.0f, 1.0f),
                      clamp(values[3], 0.0f, 1.0f));
}
