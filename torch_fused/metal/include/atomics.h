// Metal's atomic functions.
#pragma once

namespace metal {

template <int Bytes>
struct msl_bits_of {
  using type = uint;
};
template <>
struct msl_bits_of<8> {
  using type = ulong;
};
template <>
struct msl_bits_of<1> {
  using type = uchar;
};

template <class T>
constexpr bool msl_integers = same_t<T, int>::v || same_t<T, uint>::v;
template <class T>
constexpr bool msl_sums = msl_integers<T> || same_t<T, float>::v;
template <class T>
constexpr bool msl_any_atomic = msl_sums<T> || same_t<T, bool>::v;

// Fibers switch at memory accesses only, so reading and then writing is one step once both are reported.
#define MSL_ATOMIC_FUNCTION MSL_UNCHECKED __attribute__((noinline))
#define MSL_ATOMIC(NAME, TYPES, EXPRESSION)                                                           \
  template <class T>                                                                                  \
  MSL_ATOMIC_FUNCTION T NAME(volatile atomic<T>* object, typename same_as<T>::type x, memory_order) { \
    static_assert(TYPES<T>, #NAME " of this type is not in Metal");                                   \
    msl_rt.access(object, sizeof(T), MSL_ATOMIC_UPDATE, __builtin_return_address(0));                 \
    const T old = object->value;                                                                      \
    object->value = T(EXPRESSION);                                                                    \
    return old;                                                                                       \
  }
MSL_ATOMIC(atomic_fetch_add_explicit, msl_sums, old + x)
MSL_ATOMIC(atomic_fetch_sub_explicit, msl_sums, old - x)
MSL_ATOMIC(atomic_fetch_max_explicit, msl_integers, old < x ? x : old)
MSL_ATOMIC(atomic_fetch_min_explicit, msl_integers, x < old ? x : old)
MSL_ATOMIC(atomic_fetch_or_explicit, msl_integers, old | x)
MSL_ATOMIC(atomic_fetch_and_explicit, msl_integers, old& x)
MSL_ATOMIC(atomic_fetch_xor_explicit, msl_integers, old ^ x)
MSL_ATOMIC(atomic_exchange_explicit, msl_any_atomic, x)
template <class T>
MSL_ATOMIC_FUNCTION void atomic_store_explicit(volatile atomic<T>* object, typename same_as<T>::type x, memory_order) {
  msl_rt.access(object, sizeof(T), MSL_ATOMIC_WRITE, __builtin_return_address(0));
  object->value = x;
}
template <class T>
MSL_ATOMIC_FUNCTION T atomic_load_explicit(const volatile atomic<T>* object, memory_order) {
  msl_rt.access(object, sizeof(T), MSL_ATOMIC_READ, __builtin_return_address(0));
  return object->value;
}
// Whether the value was the expected one, which it otherwise becomes
template <class T>
MSL_ATOMIC_FUNCTION bool atomic_compare_exchange_weak_explicit(volatile atomic<T>* object, T* expected,
                                                               typename same_as<T>::type desired, memory_order,
                                                               memory_order) {
  msl_rt.access(object, sizeof(T), MSL_ATOMIC_UPDATE, __builtin_return_address(0));
  const T old = object->value;
  const bool equal =
      as_type<typename msl_bits_of<sizeof(T)>::type>(old) == as_type<typename msl_bits_of<sizeof(T)>::type>(*expected);
  if (equal) object->value = desired;
  *expected = old;
  return equal;
}
// Of 64 bits Metal has these two only, without a result
#define MSL_ATOMIC_ULONG(NAME, EXPRESSION)                                                      \
  MSL_ATOMIC_FUNCTION inline void NAME(volatile atomic<ulong>* object, ulong x, memory_order) { \
    msl_rt.access(object, sizeof(ulong), MSL_ATOMIC_UPDATE, __builtin_return_address(0));       \
    const ulong old = object->value;                                                            \
    object->value = EXPRESSION;                                                                 \
  }
MSL_ATOMIC_ULONG(atomic_max_explicit, old < x ? x : old)
MSL_ATOMIC_ULONG(atomic_min_explicit, x < old ? x : old)

}  // namespace metal
