// What the kernels of sampling share: tokens as integers in the sampling order, and tokens' weights.
#pragma once
#include <metal_stdlib>
#include "common/token_weight.h"
#include "sampling/sampling_params.h"
#include "sampling/sort.metal.h"
using namespace metal;
using namespace torch_fused;

constant constexpr uint PER_THREAD = 8;
constant constexpr uint SLICE_THREADS = SLICE / PER_THREAD;
constant constexpr uint THREADS = 1024;  // that search a row
constant constexpr uint PLACES = 2;      // that each of them has in what is sorted
constant constexpr uint MOST_SORTED = PLACES * THREADS;

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

  uint steps(ulong token) const { return steps_below(maximum, as_type<float>(key_bits(token_key(token))), scale); }
  ulong weight(ulong token) const { return token == 0 ? 0 : token_weight(steps(token)); }

  // Of the larger of the token and the maximum, and of the distance between them.
  uint octaves(ulong token) const {
    const float logit = as_type<float>(key_bits(token_key(token)));
    return max(octaves_of(logit, scale), octaves_of(maximum, scale)) + (steps(token) >> 24);
  }
};

// From the largest keys of a row's slices; by each simdgroup.
inline float row_maximum(device const uint* maxima, uint slices, uint lane) {
  uint largest = 0u;
  for (uint i = lane; i < slices; i += 32) largest = max(largest, maxima[i]);
  return as_type<float>(key_bits(simd_max(largest)));
}

// Values in a buffer cannot be checked without waiting for the device, so they are clamped.
inline TokenFilter row_filter(constant SamplingParams& p, device const float* row_parameters, uint row, float maximum) {
  RowParameters parameters = {p.temperature, p.top_k, p.min_p, p.top_p};
  if (p.flags & ROW_PARAMETERS) {
    device const float* values = row_parameters + 4 * row;
    parameters.temperature = values[0] >= 0.0f ? min(values[0], FLT_MAX) : 0.0f;
    parameters.top_k = clamp(values[1], 0.0f, 1048576.0f);
    parameters.top_p = top_p_of(clamp(values[2], 0.0f, 1.0f));
    parameters.min_p = clamp(values[3], 0.0f, 1.0f);
  }
  return token_filter(parameters, maximum);
}
