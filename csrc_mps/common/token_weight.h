// What sampling knows of a token: its key, which orders tokens, and its weight, an integer proportional to its
// probability. Sums of integers do not depend on their order, so every device draws the same token.
#pragma once
#include "common/shared.h"

namespace torch_fused {

SHARED_CONSTANT uint32_t kFarthest = 42u << 24;   // no token is further from the maximum; the weight there is zero
SHARED_CONSTANT uint64_t kNoTopP = ~uint64_t(0);  // a top_p of one
SHARED_CONSTANT float kLog2e = 1.44269504088896f;

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

// The whole part of total * fraction / 2^64. Of 64 random bits it is a uniform integer below `total`.
SHARED_INLINE uint64_t share_of(uint64_t total, uint64_t fraction) {
  const uint64_t low = 0xffffffffu;
  const uint64_t a = (fraction & low) * (total & low), b = (fraction & low) * (total >> 32);
  const uint64_t c = (fraction >> 32) * (total & low), middle = (a >> 32) + (b & low) + (c & low);
  return (fraction >> 32) * (total >> 32) + (b >> 32) + (c >> 32) + (middle >> 32);
}

// The size of a logit, in octaves of probability.
SHARED_INLINE uint32_t octaves_of(float logit, float scale) {
  const float octaves = (logit < 0.0f ? -logit : logit) * scale;
  return octaves < 32000.0f ? uint32_t(octaves) : 32000u;  // NaN too
}

// How much a weight, and one that it is compared with, may be off because logits, their distances and the steps are
// rounded: float32 rounds by up to 2^-24 of the size, which is `octaves` of all three.
SHARED_INLINE uint64_t rounding_of(uint64_t weight, uint32_t octaves) {
  return ((weight >> 12) * (octaves + 1)) >> 11;
}

// What a user asks for in one row. 0 is no top_k and no min_p.
struct RowParameters {
  float temperature;
  float top_k;
  float min_p;
  uint64_t top_p;  // in 2^-64, or kNoTopP
};

// A top_p of float32: the least number that rounds to it, or the one before.
SHARED_INLINE uint64_t top_p_of(float top_p) {
  if (top_p >= 1.0f) return kNoTopP;
  const uint64_t fraction = uint64_t(top_p * 18446744073709551616.0f);
  return fraction - (fraction >> 24);
}

// The same once the row's maximum is known.
struct TokenFilter {
  float scale;          // log2(e) / temperature
  float divisor;        // of the logits that are kept
  uint32_t top_k;       // tokens kept, or 0 for all
  uint64_t top_p;       // in 2^-64, or kNoTopP
  uint64_t min_weight;  // lighter tokens are dropped
};

// Temperature 0 keeps the first of the most probable tokens.
SHARED_INLINE TokenFilter token_filter(RowParameters row, float maximum) {
  const float scale = kLog2e / row.temperature;
  const bool greedy = scale > 3.402823466e38f;
  const float lightest = row.min_p * 1099511627776.0f;
  const uint64_t whole = uint64_t(lightest), min_weight = whole + (float(whole) < lightest ? 1 : 0);
  uint32_t octaves = octaves_of(maximum, scale);  // and those down to min_p, of the logit and of its distance
  for (uint64_t weight = min_weight; weight != 0 && weight < uint64_t(1) << 40; weight *= 2) octaves += 2;
  const TokenFilter filter = {scale, greedy ? 1.0f : row.temperature, uint32_t(row.top_k), greedy ? 0 : row.top_p,
                              min_weight - rounding_of(min_weight, octaves)};
  return filter;
}

// The weight that top_p keeps of `total`; at least one, so that a token stays.
SHARED_INLINE uint64_t top_p_target(uint64_t total, uint64_t top_p) {
  const uint64_t target = share_of(total, top_p);
  return target != 0 ? target : 1;
}

// Whether the token with which the running weight passes top_p's target, `mass` then, is one too many: those before it
// miss the target by no more than rounding, and, next to its weight, by too little to be chance.
SHARED_INLINE bool is_surplus(uint64_t mass, uint64_t weight, uint64_t target, uint64_t total, uint32_t octaves) {
  const uint64_t before = mass - weight, rest = total - before, missing = target - before;
  return before != 0 && missing <= weight >> 10 && missing <= rounding_of(before < rest ? before : rest, octaves);
}

}  // namespace torch_fused
