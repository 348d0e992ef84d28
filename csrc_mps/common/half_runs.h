// Runs of float16 to and from float by the machine's own instructions, which no compiler finds by itself for machines
// of unknown kind. Bits as convert.h's, payloads of NaNs aside.
#pragma once

#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>
#include <vector>

#include "convert.h"
#include "simd.h"

namespace torch_fused {

constexpr int64_t kHalfRun = 512;  // elements that a caller should convert at a time, to and from memory on its stack

void widen_run(const c10::Half* from, float* to, int64_t n);
void narrow_run(const float* from, c10::Half* to, int64_t n);

// Rounds the values in place to those that float16 holds; `halves` is room for n.
TORCH_FUSED_INLINE void round_run(float* values, c10::Half* halves, int64_t n) {
  narrow_run(values, halves, n);
  widen_run(halves, values, n);
}

// A run to be read through widen(): float16 as floats in `room`, any other type where it is. With write_run() one loop
// serves every type.
template <class T>
TORCH_FUSED_INLINE const T* readable(const T* run, int64_t /*n*/, wide_t<T>* /*room*/) {
  return run;
}
TORCH_FUSED_INLINE const float* readable(const c10::Half* run, int64_t n, float* room) {
  widen_run(run, room, n);
  return room;
}

// run[i] = value(i), rounded; float16 by way of `room`.
template <class T, class Value>
TORCH_FUSED_INLINE void write_run(T* run, int64_t n, wide_t<T>* room, const Value& value) {
  if constexpr (std::is_same_v<T, c10::Half>) {
    for (int64_t i = 0; i < n; ++i) room[i] = value(i);
    narrow_run(room, run, n);
  } else {
    for (int64_t i = 0; i < n; ++i) run[i] = narrow<T>(value(i));
  }
}

// Room for a row of n elements of a half type as floats; each `which` has its own.
template <class T, int which = 0>
TORCH_FUSED_INLINE wide_t<T>* row_room(int64_t n) {
  if constexpr (std::is_same_v<T, wide_t<T>>) {
    return nullptr;
  } else {
    static thread_local std::vector<wide_t<T>> room;
    room.resize(n);
    return room.data();
  }
}

}  // namespace torch_fused
