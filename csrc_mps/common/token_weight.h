// What sampling knows of a token: its key, which orders tokens, and its weight, an integer proportional to its
// probability. Sums of integers do not depend on their order, so every device draws the same token.
#pragma once
#include "common/shared.h"

namespace torch_fused {

SHARED_CONSTANT uint32_t kMostSteps = 42u << 24;  // no token is further from the maximum; the weight there is zero
SHARED_CONSTANT uint32_t kNoTopP = 1u << 24;      // a top_p of one

// From a float's bits. 0: never drawn (NaN, -inf); else it grows with the float, and both zeros have one key.
SHARED_INLINE uint32_t order_key(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t negative = 0u - (bits >> 31);  // all ones or zero
  const uint32_t key = 0x80000000u + ((magnitude ^ negative) - negative);
  return key & (0u - uint32_t(key - 0x00800001u < 0xff000000u));  // from the least finite value to +inf
}

// The bits of the float that has this key.
SHARED_INLINE uint32_t key_bits(uint32_t key) {
  return key >> 31 ? key - 0x80000000u : 0x80000000u | (0x80000000u - key);
}

// How far a logit is below the row's maximum, in 2^-24 octaves of probability. `scale` is log2(e) / temperature. No
// product is added to anything, so no compiler can fuse two roundings into one.
SHARED_INLINE uint32_t steps_below(float maximum, float logit, float scale) {
  const float octaves = (maximum - logit) * scale;
  const float capped = octaves < 42.0f ? octaves : 42.0f;  // NaN too
  const uint32_t steps = uint32_t(int32_t(capped * 16777216.0f));
  return steps & (0u - uint32_t(logit != maximum));  // an infinite maximum too
}

SHARED_INLINE uint32_t multiply_high(uint32_t a, uint32_t b) {
  return uint32_t((uint64_t(a) * b) >> 32);
}

// 2^(40 - steps / 2^24), rounded: a polynomial in 32-bit fixed point for the fraction, then a shift.
SHARED_INLINE uint64_t token_weight(uint32_t steps) {
  const uint32_t octaves = (steps + 0xffffffu) >> 24;
  const uint32_t fraction = ((octaves << 24) - steps) << 8;
  uint32_t power = 0x00072a3cu;
  power = 0x00289a9au + multiply_high(power, fraction);
  power = 0x013d54d8u + multiply_high(power, fraction);
  power = 0x0719fd42u + multiply_high(power, fraction);
  power = 0x1ebfdf1du + multiply_high(power, fraction);
  power = 0x58b909e8u + multiply_high(power, fraction);
  power = 0x80000000u + multiply_high(power, fraction);
  const uint64_t shift = octaves;
  return ((uint64_t(power) << 9) + ((uint64_t(1) << shift) >> 1)) >> shift;
}

// A row's parameters as integers. All four come as floats: 0 is no top_k, 1 no top_p, 0 no min_p.
struct TokenFilter {
  float scale;          // infinite for temperature 0: the first of the most probable tokens is drawn
  uint32_t top_k;       // tokens kept, or 0 for all
  uint32_t top_p;       // in 2^-24
  uint64_t min_weight;  // lighter tokens are dropped
};

SHARED_INLINE TokenFilter token_filter(float scale, float top_k, float top_p, float min_p) {
  const float lightest = min_p * 1099511627776.0f;
  const uint64_t whole = uint64_t(lightest);
  const TokenFilter filter = {scale, uint32_t(top_k), uint32_t(top_p * 16777216.0f),
                              whole + (float(whole) < lightest ? 1 : 0)};
  return filter;
}

// The weight that top_p keeps of `total`, rounded up; at least one, so that a token stays.
SHARED_INLINE uint64_t top_p_target(uint64_t total, uint32_t top_p) {
  const uint64_t low = (total & 0xffffffffu) * top_p, high = (total >> 32) * top_p;
  const uint64_t target = (high << 8) + (low >> 24) + ((low & 0xffffffu) != 0 ? 1 : 0);
  return target != 0 ? target : 1;
}

// A uniform integer below `total`: the high half of bits * total.
SHARED_INLINE uint64_t random_below(uint64_t bits, uint64_t total) {
  const uint64_t low = 0xffffffffu;
  const uint64_t a = (bits & low) * (total & low), b = (bits & low) * (total >> 32), c = (bits >> 32) * (total & low);
  const uint64_t middle = (a >> 32) + (b & low) + (c & low);
  return (bits >> 32) * (total >> 32) + (b >> 32) + (c >> 32) + (middle >> 32);
}

}  // namespace torch_fused
