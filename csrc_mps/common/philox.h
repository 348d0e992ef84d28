// Philox 4x32-10, the counter-based generator of Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC11).
#pragma once
#include "common/shared.h"

namespace torch_fused {

struct Philox {
  uint32_t x, y, z, w;
};

SHARED_INLINE Philox philox(Philox counter, uint32_t key_low, uint32_t key_high) {
  for (int round = 0; round < 10; round++) {
    const uint64_t a = uint64_t(0xD2511F53u) * counter.x;
    const uint64_t b = uint64_t(0xCD9E8D57u) * counter.z;
    const Philox next = {uint32_t(b >> 32) ^ counter.y ^ key_low, uint32_t(b), uint32_t(a >> 32) ^ counter.w ^ key_high,
                         uint32_t(a)};
    counter = next;
    key_low += 0x9E3779B9u;
    key_high += 0xBB67AE85u;
  }
  return counter;
}

// 64 random bits for one row of a batch.
SHARED_INLINE uint64_t random_bits(uint64_t seed, uint64_t offset, uint32_t row) {
  const Philox counter = {uint32_t(offset), uint32_t(offset >> 32), row, 0};
  const Philox bits = philox(counter, uint32_t(seed), uint32_t(seed >> 32));
  return uint64_t(bits.x) << 32 | bits.y;
}

}  // namespace torch_fused
