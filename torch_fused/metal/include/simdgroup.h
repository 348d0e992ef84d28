// Metal's SIMD-group and quad-group functions: the emulator has the lanes of a simdgroup exchange their values.
#pragma once

namespace metal {

// What a function makes of an argument: a swizzle or packed vector is a vector to it.
template <class A, bool = vtraits<A>::is>
struct msl_simd_value {
  using type = A;
};
template <class A>
struct msl_simd_value<A, true> {
  using type = vec<typename vtraits<A>::E, vtraits<A>::n>;
};
template <class T>  // a source may know of it
struct __is_valid_simdgroup_type
    : bool_constant<is_arithmetic_v<typename vtraits<T>::E> && sizeof(typename vtraits<T>::E) <= 4> {};
template <class A>
using simd_value = typename msl_simd_value<A>::type;

// The values that the active lanes of a simdgroup offered.
template <class T>
struct lanes : msl_lanes {
  MSL_FN bool active(uint i) const { return i < 32 && (mask >> i & 1); }
  MSL_FN T operator[](uint i) const {
    T value;
    msl_copy(&value, slots[i], sizeof(T));
    return value;
  }
};
template <class T>
MSL_FN lanes<T> exchange(const T& value, int operation, int line, const char* file) {
  static_assert(sizeof(typename vtraits<T>::E) <= 4 || !is_arithmetic_v<typename vtraits<T>::E>,
                "simdgroup functions take numbers of up to 32 bits, and vectors of them");
  static_assert(!same_t<typename vtraits<T>::E, bool>::v, "simdgroup functions take no bool: convert it to a number");
  lanes<T> all;
  msl_rt.exchange(&value, sizeof(T), operation, &all, line, file);
  return all;
}

// The order of a butterfly, as on a GPU: the same bits as there.
template <class T, class Function>
MSL_UNCHECKED T simd_reduce(const T& value, Function function, int operation, int line, const char* file) {
  const lanes<T> all = exchange(value, operation, line, file);
  T values[32];
  uint present = all.mask;
  for (uint i = 0; i < 32; i++) values[i] = all.active(i) ? all[i] : value;
  for (uint distance = 16; distance > 0; distance /= 2) {
    for (uint i = 0; i < distance; i++) {
      if (!(present >> (i + distance) & 1)) continue;
      values[i] = present >> i & 1 ? function(values[i], values[i + distance]) : values[i + distance];
      present |= 1u << i;
    }
  }
  return values[0];
}
template <class T, class Function>
MSL_UNCHECKED T quad_reduce(const T& value, Function function, int operation, int line, const char* file) {
  const lanes<T> all = exchange(value, operation, line, file);
  T values[4];
  uint present = all.mask >> (all.lane & ~3u) & 15;
  for (uint i = 0; i < 4; i++) values[i] = present >> i & 1 ? all[(all.lane & ~3u) + i] : value;
  for (uint distance = 2; distance > 0; distance /= 2) {
    for (uint i = 0; i < distance; i++) {
      if (!(present >> (i + distance) & 1)) continue;
      values[i] = present >> i & 1 ? function(values[i], values[i + distance]) : values[i + distance];
      present |= 1u << i;
    }
  }
  return values[0];
}
#define MSL_REDUCE(NAME, OPERATION, EXPRESSION)                                                          \
  template <class A, class T = simd_value<A>>                                                            \
  MSL_FN T simd_##NAME(A value, MSL_HERE) {                                                              \
    return simd_reduce(T(value), [](T a, T b) { return T(EXPRESSION); }, OPERATION, line_, file_);       \
  }                                                                                                      \
  template <class A, class T = simd_value<A>>                                                            \
  MSL_FN T quad_##NAME(A value, MSL_HERE) {                                                              \
    return quad_reduce(T(value), [](T a, T b) { return T(EXPRESSION); }, OPERATION + 100, line_, file_); \
  }
MSL_REDUCE(sum, 1, a + b)
MSL_REDUCE(product, 2, a* b)
MSL_REDUCE(max, 3, max(a, b))
MSL_REDUCE(min, 4, min(a, b))
MSL_REDUCE(or, 5, a | b)
MSL_REDUCE(and, 6, a& b)
MSL_REDUCE(xor, 7, a ^ b)

// Shuffles. Reading a lane that is not there is an error, but down and up leave such a value as it was. A quadgroup's
// lane is that of its four threads.
template <class T>
MSL_FN T simd_take(const lanes<T>& all, uint lane, int line, const char* file) {
  if (!all.active(lane)) msl_rt.fail("simdgroup function reads a lane that is not active", line, file);
  return all[lane];
}
#define MSL_SHUFFLE(NAME, PARAMETER, OPERATION, SIMD_RESULT, QUAD_RESULT)   \
  template <class A, class T = simd_value<A>>                               \
  MSL_FN T simd_##NAME(A value, PARAMETER, MSL_HERE) {                      \
    const lanes<T> all = exchange(T(value), OPERATION, line_, file_);       \
    return SIMD_RESULT;                                                     \
  }                                                                         \
  template <class A, class T = simd_value<A>>                               \
  MSL_FN T quad_##NAME(A value, PARAMETER, MSL_HERE) {                      \
    const lanes<T> all = exchange(T(value), OPERATION + 100, line_, file_); \
    const uint first = all.lane & ~3u, lane = all.lane & 3u;                \
    return QUAD_RESULT;                                                     \
  }
#define MSL_TAKE(LANE) simd_take(all, LANE, line_, file_)
#define MSL_TAKE_IF(CONDITION, LANE) CONDITION&& all.active(LANE) ? all[LANE] : T(value)
MSL_SHUFFLE(shuffle, ushort from, 8, MSL_TAKE(from), MSL_TAKE(first + from % 4))
MSL_SHUFFLE(broadcast, ushort from, 9, MSL_TAKE(from), MSL_TAKE(first + from % 4))
MSL_SHUFFLE(shuffle_xor, ushort mask, 11, MSL_TAKE(all.lane ^ mask), MSL_TAKE(first + (lane ^ mask) % 4))
MSL_SHUFFLE(shuffle_down, ushort by, 12, MSL_TAKE_IF(true, all.lane + by), MSL_TAKE_IF(lane + by < 4, all.lane + by))
MSL_SHUFFLE(shuffle_up, ushort by, 13, MSL_TAKE_IF(all.lane >= by, all.lane - by),
            MSL_TAKE_IF(lane >= by, all.lane - by))
MSL_SHUFFLE(shuffle_rotate_down, ushort by, 19, MSL_TAKE((all.lane + by) % 32), MSL_TAKE(first + (lane + by) % 4))
MSL_SHUFFLE(shuffle_rotate_up, ushort by, 20, MSL_TAKE((all.lane + 32 - by % 32) % 32),
            MSL_TAKE(first + (lane + 4 - by % 4) % 4))

// The filling of `modulo` threads shifts in where a group of so many ends.
template <class T>
MSL_FN T msl_shuffle_and_fill_down(T value, T filling, uint by, uint modulo, uint last, int operation, int line,
                                   const char* file) {
  const lanes<T> all = exchange(value, operation, line, file);
  const lanes<T> fillings = exchange(filling, operation + 1, line, file);
  const uint first = all.lane & ~last, group = all.lane - (all.lane - first) % modulo, lane = all.lane - group;
  return lane + by < modulo ? simd_take(all, all.lane + by, line, file)
                            : simd_take(fillings, group + (lane + by) % modulo, line, file);
}
template <class T>
MSL_FN T msl_shuffle_and_fill_up(T value, T filling, uint by, uint modulo, uint last, int operation, int line,
                                 const char* file) {
  const lanes<T> all = exchange(value, operation, line, file);
  const lanes<T> fillings = exchange(filling, operation + 1, line, file);
  const uint first = all.lane & ~last, group = all.lane - (all.lane - first) % modulo, lane = all.lane - group;
  return lane >= by ? simd_take(all, all.lane - by, line, file)
                    : simd_take(fillings, group + (lane + modulo - by % modulo) % modulo, line, file);
}
#define MSL_FILL(NAME, OPERATION)                                                                             \
  template <class A, class T = simd_value<A>>                                                                 \
  MSL_FN T simd_##NAME(A value, typename same_as<T>::type filling, ushort by, ushort modulo = 32, MSL_HERE) { \
    return msl_##NAME<T>(value, filling, by, modulo, 31, OPERATION, line_, file_);                            \
  }                                                                                                           \
  template <class A, class T = simd_value<A>>                                                                 \
  MSL_FN T quad_##NAME(A value, typename same_as<T>::type filling, ushort by, ushort modulo = 4, MSL_HERE) {  \
    return msl_##NAME<T>(value, filling, by, modulo, 3, OPERATION + 100, line_, file_);                       \
  }
MSL_FILL(shuffle_and_fill_down, 30)
MSL_FILL(shuffle_and_fill_up, 32)

template <class A, class T = simd_value<A>>
MSL_FN T simd_broadcast_first(A value, MSL_HERE) {
  const lanes<T> all = exchange(T(value), 10, line_, file_);
  return all[__builtin_ctz(all.mask)];
}
template <class A, class T = simd_value<A>>
MSL_FN T quad_broadcast_first(A value, MSL_HERE) {
  const lanes<T> all = exchange(T(value), 110, line_, file_);
  return all[__builtin_ctz(all.mask & 15u << (all.lane & ~3u))];
}

// Prefixes: over the lanes below, or up to, the asking one.
#define MSL_PREFIX(NAME, OPERATION, START, OPERATOR, COMPARISON)            \
  template <class A, class T = simd_value<A>>                               \
  MSL_FN T simd_prefix_##NAME(A value, MSL_HERE) {                          \
    const lanes<T> all = exchange(T(value), OPERATION, line_, file_);       \
    T result = T(START);                                                    \
    for (uint i = 0; i COMPARISON all.lane; i++) {                          \
      if (all.active(i)) result = T(result OPERATOR all[i]);                \
    }                                                                       \
    return result;                                                          \
  }                                                                         \
  template <class A, class T = simd_value<A>>                               \
  MSL_FN T quad_prefix_##NAME(A value, MSL_HERE) {                          \
    const lanes<T> all = exchange(T(value), OPERATION + 100, line_, file_); \
    T result = T(START);                                                    \
    for (uint i = all.lane & ~3u; i COMPARISON all.lane; i++) {             \
      if (all.active(i)) result = T(result OPERATOR all[i]);                \
    }                                                                       \
    return result;                                                          \
  }
MSL_PREFIX(inclusive_sum, 14, 0, +, <=)
MSL_PREFIX(exclusive_sum, 15, 0, +, <)
MSL_PREFIX(inclusive_product, 21, 1, *, <=)
MSL_PREFIX(exclusive_product, 22, 1, *, <)

// Votes

MSL_FN simd_vote msl_ballot(bool condition, int operation, int line, const char* file) {
  const lanes<uint> all = exchange<uint>(condition, operation, line, file);
  ulong bits = 0;
  for (uint i = 0; i < 32; i++) {
    if (all.active(i)) bits |= ulong(all[i]) << i;
  }
  return simd_vote(bits);
}
MSL_FN simd_vote simd_ballot(bool condition, MSL_HERE) {
  return msl_ballot(condition, 16, line_, file_);
}
MSL_FN bool simd_any(bool condition, MSL_HERE) {
  return simd_reduce<uint>(condition, [](uint a, uint b) { return a | b; }, 17, line_, file_);
}
MSL_FN bool simd_all(bool condition, MSL_HERE) {
  return simd_reduce<uint>(condition, [](uint a, uint b) { return a & b; }, 18, line_, file_);
}
MSL_FN simd_vote simd_active_threads_mask(MSL_HERE) {
  return msl_ballot(true, 23, line_, file_);
}
MSL_FN bool simd_is_first(MSL_HERE) {
  const lanes<uint> all = exchange<uint>(0, 24, line_, file_);
  return all.lane == uint(__builtin_ctz(all.mask));
}
MSL_FN bool simd_is_helper_thread() {
  return false;
}
MSL_FN bool quad_any(bool condition, MSL_HERE) {
  return quad_reduce<uint>(condition, [](uint a, uint b) { return a | b; }, 117, line_, file_);
}
MSL_FN bool quad_all(bool condition, MSL_HERE) {
  return quad_reduce<uint>(condition, [](uint a, uint b) { return a & b; }, 118, line_, file_);
}
MSL_FN bool quad_is_first(MSL_HERE) {
  const lanes<uint> all = exchange<uint>(0, 124, line_, file_);
  return all.lane == uint(__builtin_ctz(all.mask & 15u << (all.lane & ~3u)));
}
MSL_FN quad_vote quad_ballot(bool condition, MSL_HERE) {
  const lanes<uint> all = exchange<uint>(condition, 116, line_, file_);
  ulong bits = 0;
  for (uint i = 0; i < 4; i++) {
    if (all.active((all.lane & ~3u) + i)) bits |= ulong(all[(all.lane & ~3u) + i]) << i;
  }
  return quad_vote(bits);
}
MSL_FN quad_vote quad_active_threads_mask(MSL_HERE) {
  return quad_ballot(true, line_, file_);
}

}  // namespace metal
