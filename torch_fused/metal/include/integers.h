// Metal's functions of integers, of every type and width.
#pragma once

namespace metal {

// No type is wider than long: what needs twice its width has the compiler's
template <class T>
struct msl_twice {
  using type = conditional_t<(sizeof(T) < 8), long, __int128>;
};
template <class T>
MSL_FN T msl_saturated(typename msl_twice<T>::type x) {
  using Limits = numeric_limits<T>;
  return x > Limits::max() ? Limits::max() : x < Limits::min() ? Limits::min() : T(x);
}
template <class T>
MSL_FN T msl_bit_field(T x, uint offset, uint bits) {  // the lowest `bits` bits above `offset`
  constexpr uint width = 8 * sizeof(T);
  using U = make_unsigned_t<T>;
  if (bits == 0) return T(0);
  const uint above = width - bits;
  const U top = U(U(x) >> (offset % width)) << (above % width);
  return T(T(top) >> (above % width));
}

#define MSL_INTEGER_FUNCTIONS(T)                                                                        \
  MSL_FN T abs(T x) {                                                                                   \
    return T(x < T(0) ? -x : x);                                                                        \
  }                                                                                                     \
  MSL_FN make_unsigned_t<T> absdiff(T x, T y) {                                                         \
    using U = make_unsigned_t<T>;                                                                       \
    return x > y ? U(U(x) - U(y)) : U(U(y) - U(x));                                                     \
  }                                                                                                     \
  MSL_FN T addsat(T x, T y) {                                                                           \
    return msl_saturated<T>(msl_twice<T>::type(x) + y);                                                 \
  }                                                                                                     \
  MSL_FN T subsat(T x, T y) {                                                                           \
    return msl_saturated<T>(msl_twice<T>::type(x) - y);                                                 \
  }                                                                                                     \
  MSL_FN T max(T x, T y) {                                                                              \
    return x < y ? y : x;                                                                               \
  }                                                                                                     \
  MSL_FN T min(T x, T y) {                                                                              \
    return y < x ? y : x;                                                                               \
  }                                                                                                     \
  MSL_FN T max3(T x, T y, T z) {                                                                        \
    return max(x, max(y, z));                                                                           \
  }                                                                                                     \
  MSL_FN T min3(T x, T y, T z) {                                                                        \
    return min(x, min(y, z));                                                                           \
  }                                                                                                     \
  MSL_FN T median3(T x, T y, T z) {                                                                     \
    return max(min(x, y), min(max(x, y), z));                                                           \
  }                                                                                                     \
  MSL_FN T clamp(T x, T low, T high) {                                                                  \
    return min(max(x, low), high);                                                                      \
  }                                                                                                     \
  MSL_FN T clz(T x) {                                                                                   \
    const ulong bits = make_unsigned_t<T>(x);                                                           \
    return T(bits ? __builtin_clzl(bits) - (64 - 8 * sizeof(T)) : 8 * sizeof(T));                       \
  }                                                                                                     \
  MSL_FN T ctz(T x) {                                                                                   \
    return T(x ? __builtin_ctzl(ulong(x)) : 8 * sizeof(T));                                             \
  }                                                                                                     \
  MSL_FN T popcount(T x) {                                                                              \
    return T(__builtin_popcountl(make_unsigned_t<T>(x)));                                               \
  }                                                                                                     \
  MSL_FN T reverse_bits(T x) {                                                                          \
    make_unsigned_t<T> result = 0;                                                                      \
    for (uint i = 0; i < 8 * sizeof(T); i++) result = result << 1 | (x >> i & 1);                       \
    return T(result);                                                                                   \
  }                                                                                                     \
  MSL_FN T rotate(T x, T by) {                                                                          \
    constexpr uint width = 8 * sizeof(T);                                                               \
    const uint left = uint(by) % width;                                                                 \
    const auto bits = make_unsigned_t<T>(x);                                                            \
    return T(bits << left | bits >> ((width - left) % width));                                          \
  }                                                                                                     \
  MSL_FN T hadd(T x, T y) {                                                                             \
    return T((msl_twice<T>::type(x) + y) >> 1);                                                         \
  }                                                                                                     \
  MSL_FN T rhadd(T x, T y) {                                                                            \
    return T((msl_twice<T>::type(x) + y + 1) >> 1);                                                     \
  }                                                                                                     \
  MSL_FN T mulhi(T x, T y) {                                                                            \
    using U = conditional_t<is_signed_v<T>, __int128, unsigned __int128>;                               \
    return T((U(x) * U(y)) >> (8 * sizeof(T)));                                                         \
  }                                                                                                     \
  MSL_FN T madhi(T x, T y, T z) {                                                                       \
    return T(mulhi(x, y) + z);                                                                          \
  }                                                                                                     \
  MSL_FN T madsat(T x, T y, T z) {                                                                      \
    using U = conditional_t<is_signed_v<T>, __int128, unsigned __int128>;                               \
    const U exact = U(x) * U(y) + U(z);                                                                 \
    if (exact > U(numeric_limits<T>::max())) return numeric_limits<T>::max();                           \
    return is_signed_v<T> && exact < U(numeric_limits<T>::min()) ? numeric_limits<T>::min() : T(exact); \
  }                                                                                                     \
  MSL_FN T extract_bits(T x, uint offset, uint bits) {                                                  \
    return msl_bit_field(x, offset, bits);                                                              \
  }                                                                                                     \
  MSL_FN T insert_bits(T base, T insert, uint offset, uint bits) {                                      \
    if (bits == 0) return base;                                                                         \
    constexpr uint width = 8 * sizeof(T);                                                               \
    using U = make_unsigned_t<T>;                                                                       \
    const U mask = U(U(U(~U(0)) >> ((width - bits) % width)) << (offset % width));                      \
    return T((U(base) & U(~mask)) | (U(U(insert) << (offset % width)) & mask));                         \
  }
MSL_FOR_INTEGERS(MSL_INTEGER_FUNCTIONS)
MSL_FN float abs(float x) {
  return ::fabsf(x);
}
MSL_FN half abs(half x) {
  return half(::fabsf(float(x)));
}
template <MSL_BFLOAT>
MSL_FN T abs(T x) {
  return T(::fabsf(float(x)));
}

// Factors have 24 bits
#define MSL_24_BITS(T)            \
  MSL_FN T mul24(T x, T y) {      \
    return x * y;                 \
  }                               \
  MSL_FN T mad24(T x, T y, T z) { \
    return x * y + z;             \
  }
MSL_24_BITS(int)
MSL_24_BITS(uint)

MSL_VECTOR_1(abs)
MSL_VECTOR_1(clz)
MSL_VECTOR_1(ctz)
MSL_VECTOR_1(popcount)
MSL_VECTOR_1(reverse_bits)
MSL_VECTOR_2(absdiff)
MSL_VECTOR_2(addsat)
MSL_VECTOR_2(hadd)
MSL_VECTOR_2(mul24)
MSL_VECTOR_2(mulhi)
MSL_VECTOR_2(rhadd)
MSL_VECTOR_2(rotate)
MSL_VECTOR_2(subsat)
MSL_VECTOR_3(mad24)
MSL_VECTOR_3(madhi)
MSL_VECTOR_3(madsat)
template <class A, class V = vector_of<A>>
MSL_FN V extract_bits(const A& x, uint offset, uint bits) {
  V result(x);
  for (int i = 0; i < vtraits<V>::n; i++) result.d[i] = extract_bits(result.d[i], offset, bits);
  return result;
}
template <class A, class B, class V = vector_of<A, B>>
MSL_FN V insert_bits(const A& base, const B& insert, uint offset, uint bits) {
  V result(base), other(insert);
  for (int i = 0; i < vtraits<V>::n; i++) result.d[i] = insert_bits(result.d[i], other.d[i], offset, bits);
  return result;
}

}  // namespace metal
