// Rows of bfloat16 two neighbours at a time: both come out of, and go into, one 32-bit word with shifts and masks,
// which vectorises to half the work of widening and narrowing 16-bit elements one by one.
#pragma once

#include <type_traits>

#include "convert.h"

namespace torch_fused {

template <class T>
constexpr bool kInPairs = std::is_same_v<T, c10::BFloat16>;

struct Pair {
  float first, second;
};

TORCH_FUSED_INLINE Pair load_pair(const c10::BFloat16* from) {
  uint32_t word;
  std::memcpy(&word, from, sizeof(word));
  return {bit_copy<float>(word << 16), bit_copy<float>(word & 0xffff0000)};
}

TORCH_FUSED_INLINE Pair round_pair(Pair pair) {
  return {round_to<c10::BFloat16>(pair.first), round_to<c10::BFloat16>(pair.second)};
}

// Stores a pair that is exact in bfloat16, as round_pair leaves it.
TORCH_FUSED_INLINE void store_pair(c10::BFloat16* to, Pair pair) {
  const uint32_t word = (bit_copy<uint32_t>(pair.first) >> 16) | bit_copy<uint32_t>(pair.second);
  std::memcpy(static_cast<void*>(to), &word, sizeof(word));
}

}  // namespace torch_fused
