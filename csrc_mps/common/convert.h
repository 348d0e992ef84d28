// Half types to and from float in branch-free integer steps, which every compiler vectorises. Bits as torch's, NaNs
// aside.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simd.h"

namespace torch_fused {

template <class To, class From>
TORCH_FUSED_INLINE To bit_copy(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_copy keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// The type that arithmetic on T is done in: float, or double for double.
template <class T>
struct Wide {
  using type = T;
  static TORCH_FUSED_INLINE T widen(T value) { return value; }
  static TORCH_FUSED_INLINE T narrow(T value) { return value; }
  static TORCH_FUSED_INLINE T round(T value) { return value; }
  static TORCH_FUSED_INLINE T narrow_exact(T value) { return value; }
};

template <>
struct Wide<c10::BFloat16> {
  using type = float;
  static TORCH_FUSED_INLINE float widen(c10::BFloat16 value) { return bit_copy<float>(uint32_t(value.x) << 16); }
  // To the nearest, ties to even, in the high half. A NaN that comes from arithmetic on bfloat16 values, or from the
  // CPU, has no low bits, so the addition cannot carry it away and no test is needed.
  static TORCH_FUSED_INLINE uint32_t nearest(float value) {
    const uint32_t bits = bit_copy<uint32_t>(value);
    return bits + 0x7fff + ((bits >> 16) & 1);
  }
  static TORCH_FUSED_INLINE c10::BFloat16 narrow(float value) {
    return c10::BFloat16(static_cast<uint16_t>(nearest(value) >> 16), c10::BFloat16::from_bits());
  }
  static TORCH_FUSED_INLINE float round(float value) { return bit_copy<float>(nearest(value) & 0xffff0000); }
  static TORCH_FUSED_INLINE c10::BFloat16 narrow_exact(float value) {
    return c10::BFloat16(static_cast<uint16_t>(bit_copy<uint32_t>(value) >> 16), c10::BFloat16::from_bits());
  }
};

template <>
struct Wide<c10::Half> {
  using type = float;
  static TORCH_FUSED_INLINE float widen(c10::Half value) {
    const uint32_t magnitude = value.x & 0x7fff, sign = uint32_t(value.x & 0x8000) << 16;
    // Multiplying by 2^112 moves the exponent's bias, and makes subnormals normal.
    const uint32_t finite = bit_copy<uint32_t>(bit_copy<float>(magnitude << 13) * 0x1p112f);
    return bit_copy<float>(sign | finite | (magnitude >= 0x7c00 ? 0x7f800000 : 0));
  }
  static TORCH_FUSED_INLINE c10::Half narrow(float value) {
    const uint32_t bits = bit_copy<uint32_t>(value), magnitude = bits & 0x7fffffff;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // Adding 0.5 lets the adder round a subnormal result at its last bit.
    const uint32_t subnormal = bit_copy<uint32_t>(bit_copy<float>(magnitude) + 0.5f) - bit_copy<uint32_t>(0.5f);
    const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    uint32_t result = magnitude < (113u << 23) ? subnormal : normal;
    result = magnitude >= (143u << 23) ? special : result;
    return c10::Half(static_cast<uint16_t>(result | ((bits >> 16) & 0x8000)), c10::Half::from_bits());
  }
  static TORCH_FUSED_INLINE float round(float value) { return widen(narrow(value)); }
  static TORCH_FUSED_INLINE c10::Half narrow_exact(float value) { return narrow(value); }
};

template <class T>
using wide_t = typename Wide<T>::type;

// Whether results of that arithmetic are rounded to T.
template <class T>
constexpr bool kRounds = !std::is_same_v<T, wide_t<T>>;

template <class T>
TORCH_FUSED_INLINE wide_t<T> widen(T value) {
  return Wide<T>::widen(value);
}
template <class T>
TORCH_FUSED_INLINE T narrow(wide_t<T> value) {
  return Wide<T>::narrow(value);
}

// widen(narrow(value)): the value rounded to T.
template <class T>
TORCH_FUSED_INLINE wide_t<T> round_to(wide_t<T> value) {
  return Wide<T>::round(value);
}

// narrow() of a value that T holds exactly, such as round_to's: nothing is left to round.
template <class T>
TORCH_FUSED_INLINE T narrow_exact(wide_t<T> value) {
  return Wide<T>::narrow_exact(value);
}

}  // namespace torch_fused
