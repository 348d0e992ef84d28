// Metal's standard library for CUDA, compiled by NVRTC: a warp is a simdgroup, a block a threadgroup, __shared__
// memory threadgroup memory. Blocks are whole, so a builtin of the grid is a product of block and grid sizes.
#pragma once
#include "vector.h"

#define MSL_TG_VAR(ID, LINE, NAME, TYPE, ...) __shared__ TYPE NAME __VA_ARGS__

#define INFINITY (1.0f / 0.0f)
#define NAN __builtin_bit_cast(float, 0x7fc00000)
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define MAXFLOAT FLT_MAX
#define HALF_MAX half(65504.0f)
#define M_PI_F 3.14159265358979f
#define M_LOG2E_F 1.44269504088896f
#define M_LN2_F 0.69314718055995f

namespace msl_cuda {

MSL_FN unsigned thread_index() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}
MSL_FN unsigned thread_count() {
  return blockDim.x * blockDim.y * blockDim.z;
}
MSL_FN unsigned lane_index() {
  return thread_index() & 31;
}
// The lanes this warp has: fewer than 32 in the last warp of a block that is not whole warps
MSL_FN unsigned lane_mask() {
  const unsigned left = thread_count() - (thread_index() & ~31u);
  return left >= 32 ? 0xffffffffu : (1u << left) - 1;
}

// A value of any type, moved between lanes as 32-bit words
template <class T, class Shuffle>
MSL_FN T shuffle_words(T value, Shuffle shuffle) {
  constexpr int count = (sizeof(T) + 3) / 4;
  unsigned words[count] = {};
  memcpy(words, &value, sizeof(value));
  for (int i = 0; i < count; i++) words[i] = shuffle(words[i]);
  memcpy(&value, words, sizeof(value));
  return value;
}

// A butterfly: the same order of operations, hence the same bits, in every lane
template <class T, class Function>
MSL_FN T reduce(T value, Function function) {
  const unsigned mask = lane_mask(), lane = lane_index(), lanes = __popc(mask);
  for (unsigned distance = 16; distance > 0; distance /= 2) {
    const T other = shuffle_words(value, [=](unsigned word) { return __shfl_xor_sync(mask, word, distance); });
    if ((lane ^ distance) < lanes) value = function(value, other);
  }
  return lanes == 32 ? value : shuffle_words(value, [=](unsigned word) { return __shfl_sync(mask, word, 0); });
}

template <class T>
struct same_as {  // keeps an argument out of template deduction
  using type = T;
};

}  // namespace msl_cuda

namespace metal {

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;

template <class To, class From>
MSL_FN To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type: the sizes differ");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// 16-bit floats: stored as bits, computed with in float, rounded to nearest even

struct half {
  ushort bits;
  half() = default;
  MSL_FN half(float f) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f)); }
  MSL_FN operator float() const {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
    return f;
  }
};

struct bfloat {
  ushort bits;
  bfloat() = default;
  MSL_FN bfloat(float f) {
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(f));
#else
    const uint u = as_type<uint>(f);
    bits = f != f ? 0x7fff : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
#endif
  }
  MSL_FN operator float() const { return as_type<float>(uint(bits) << 16); }
};

template <class T>
struct is_half_type {
  static constexpr bool v = same_t<T, half>::v || same_t<T, bfloat>::v;
};
template <class T>
MSL_FN typename eif<is_half_type<T>::v, T>::type operator-(T a) {
  a.bits ^= 0x8000;
  return a;
}
// Two of one type make that type; with a float, the built-in operator makes a float
#define MSL_HALF_ARITHMETIC(OP)                                                  \
  template <class T>                                                             \
  MSL_FN typename eif<is_half_type<T>::v, T>::type operator OP(T a, T b) {       \
    return T(float(a) OP float(b));                                              \
  }                                                                              \
  template <class T, class U>                                                    \
  MSL_FN typename eif<is_half_type<T>::v, T>::type& operator OP##=(T & a, U b) { \
    return a = T(float(a) OP float(b));                                          \
  }
MSL_HALF_ARITHMETIC(+)
MSL_HALF_ARITHMETIC(-)
MSL_HALF_ARITHMETIC(*)
MSL_HALF_ARITHMETIC(/)

#define MSL_VECTORS(T)    \
  using T##2 = vec<T, 2>; \
  using T##3 = vec<T, 3>; \
  using T##4 = vec<T, 4>;
MSL_VECTORS(float)
MSL_VECTORS(half)
MSL_VECTORS(bfloat)
MSL_VECTORS(int)
MSL_VECTORS(uint)
MSL_VECTORS(short)
MSL_VECTORS(ushort)
MSL_VECTORS(char)
MSL_VECTORS(uchar)
MSL_VECTORS(long)
MSL_VECTORS(ulong)
MSL_VECTORS(bool)
using packed_float3 = packed3<float>;
using packed_float4 = packed4<float>;
using packed_half3 = packed3<half>;
using packed_half4 = packed4<half>;

// Type traits and limits

template <class A, class B>
constexpr bool is_same_v = same_t<A, B>::v;
template <class A, class B>
struct is_same {
  static constexpr bool value = same_t<A, B>::v;
};
template <bool Condition, class T = void>
using enable_if_t = typename eif<Condition, T>::type;
template <bool Condition, class T, class F>
struct conditional {
  using type = T;
};
template <class T, class F>
struct conditional<false, T, F> {
  using type = F;
};
template <bool Condition, class T, class F>
using conditional_t = typename conditional<Condition, T, F>::type;

template <class T>
struct numeric_limits;
#define MSL_INTEGER_LIMITS(T, MIN, MAX) \
  template <>                           \
  struct numeric_limits<T> {            \
    static constexpr T min() {          \
      return MIN;                       \
    }                                   \
    static constexpr T lowest() {       \
      return MIN;                       \
    }                                   \
    static constexpr T max() {          \
      return MAX;                       \
    }                                   \
  };
MSL_INTEGER_LIMITS(int, -0x7fffffff - 1, 0x7fffffff)
MSL_INTEGER_LIMITS(uint, 0, ~0u)
MSL_INTEGER_LIMITS(long, -0x7fffffffffffffff - 1, 0x7fffffffffffffff)
MSL_INTEGER_LIMITS(ulong, 0, ~0ul)
#define MSL_FLOAT_LIMITS(T, CONSTEXPR, MIN, MAX) \
  template <>                                    \
  struct numeric_limits<T> {                     \
    static CONSTEXPR T min() {                   \
      return T(MIN);                             \
    }                                            \
    static CONSTEXPR T lowest() {                \
      return T(-MAX);                            \
    }                                            \
    static CONSTEXPR T max() {                   \
      return T(MAX);                             \
    }                                            \
    static CONSTEXPR T infinity() {              \
      return T(INFINITY);                        \
    }                                            \
    static CONSTEXPR T quiet_NaN() {             \
      return T(NAN);                             \
    }                                            \
  };
MSL_FLOAT_LIMITS(float, constexpr, FLT_MIN, FLT_MAX)
MSL_FLOAT_LIMITS(half, MSL_FN, 6.103515625e-05f, 65504.0f)
MSL_FLOAT_LIMITS(bfloat, MSL_FN, FLT_MIN, 3.38953139e+38f)

// Mathematics

#define MSL_VECTOR_UNARY(NAME)                              \
  template <class T, int N>                                 \
  MSL_FN vec<T, N> NAME(const vec<T, N>& v) {               \
    vec<T, N> result;                                       \
    for (int i = 0; i < N; i++) result.d[i] = NAME(v.d[i]); \
    return result;                                          \
  }
#define MSL_UNARY(NAME, EXPRESSION) \
  MSL_FN float NAME(float x) {      \
    return EXPRESSION;              \
  }                                 \
  MSL_FN half NAME(half h) {        \
    return half(NAME(float(h)));    \
  }                                 \
  MSL_FN bfloat NAME(bfloat h) {    \
    return bfloat(NAME(float(h)));  \
  }                                 \
  MSL_VECTOR_UNARY(NAME)
MSL_UNARY(exp, ::expf(x))
MSL_UNARY(exp2, ::exp2f(x))
MSL_UNARY(log, ::logf(x))
MSL_UNARY(log2, ::log2f(x))
MSL_UNARY(sqrt, ::sqrtf(x))
MSL_UNARY(rsqrt, ::rsqrtf(x))
MSL_UNARY(sin, ::sinf(x))
MSL_UNARY(cos, ::cosf(x))
MSL_UNARY(tanh, ::tanhf(x))
MSL_UNARY(floor, ::floorf(x))
MSL_UNARY(ceil, ::ceilf(x))
MSL_UNARY(rint, ::rintf(x))
MSL_UNARY(round, ::roundf(x))
MSL_UNARY(trunc, ::truncf(x))
MSL_UNARY(fabs, ::fabsf(x))
MSL_UNARY(sign, x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x)

MSL_FN float abs(float x) {
  return ::fabsf(x);
}
MSL_FN int abs(int x) {
  return x < 0 ? -x : x;
}
MSL_VECTOR_UNARY(abs)

#define MSL_VECTOR_BINARY(NAME)                                     \
  template <class T, int N>                                         \
  MSL_FN vec<T, N> NAME(const vec<T, N>& a, const vec<T, N>& b) {   \
    vec<T, N> result;                                               \
    for (int i = 0; i < N; i++) result.d[i] = NAME(a.d[i], b.d[i]); \
    return result;                                                  \
  }
#define MSL_BINARY(NAME, EXPRESSION)    \
  MSL_FN float NAME(float a, float b) { \
    return EXPRESSION;                  \
  }                                     \
  MSL_VECTOR_BINARY(NAME)
MSL_BINARY(pow, ::powf(a, b))
MSL_BINARY(fmax, ::fmaxf(a, b))
MSL_BINARY(fmin, ::fminf(a, b))
MSL_BINARY(max, ::fmaxf(a, b))
MSL_BINARY(min, ::fminf(a, b))
template <class T>
MSL_FN T max(T a, T b) {
  return a < b ? b : a;
}
template <class T>
MSL_FN T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
MSL_FN T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}
template <class T>
MSL_FN T select(T a, T b, bool condition) {
  return condition ? b : a;
}

MSL_FN float fma(float a, float b, float c) {
  return ::fmaf(a, b, c);
}
template <class T, int N>
MSL_FN vec<T, N> fma(const vec<T, N>& a, const vec<T, N>& b, const vec<T, N>& c) {
  vec<T, N> result;
  for (int i = 0; i < N; i++) result.d[i] = fma(a.d[i], b.d[i], c.d[i]);
  return result;
}

MSL_FN bool isnan(float x) {
  return x != x;
}
MSL_FN bool isinf(float x) {
  return ::fabsf(x) == INFINITY;
}
MSL_FN bool isfinite(float x) {
  return ::fabsf(x) < INFINITY;
}

MSL_FN uint popcount(uint x) {
  return __popc(x);
}
MSL_FN uint clz(uint x) {
  return __clz(x);
}
MSL_FN uint ctz(uint x) {
  return x ? __ffs(x) - 1 : 32;
}
MSL_FN uint mulhi(uint a, uint b) {
  return __umulhi(a, b);
}

namespace fast {
MSL_UNARY(exp, ::__expf(x))
MSL_UNARY(exp2, ::exp2f(x))
MSL_UNARY(log, ::__logf(x))
MSL_UNARY(log2, ::__log2f(x))
MSL_UNARY(sin, ::__sinf(x))
MSL_UNARY(cos, ::__cosf(x))
MSL_BINARY(pow, ::__powf(a, b))
MSL_BINARY(divide, ::__fdividef(a, b))
using metal::fmax;
using metal::fmin;
using metal::max;
using metal::min;
using metal::rsqrt;
using metal::sqrt;
using metal::tanh;
}  // namespace fast

namespace precise {
MSL_BINARY(divide, a / b)
using metal::cos;
using metal::exp;
using metal::exp2;
using metal::fmax;
using metal::fmin;
using metal::log;
using metal::log2;
using metal::max;
using metal::min;
using metal::pow;
using metal::rsqrt;
using metal::sin;
using metal::sqrt;
using metal::tanh;
}  // namespace precise

// Barriers

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
MSL_FN mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(int(a) | int(b));
}
MSL_FN void threadgroup_barrier(mem_flags) {
  __syncthreads();
}
MSL_FN void simdgroup_barrier(mem_flags) {
  __syncwarp(msl_cuda::lane_mask());
}

// Simdgroup functions

#define MSL_SHUFFLE(NAME, INTRINSIC)                                                               \
  template <class T>                                                                               \
  MSL_FN T NAME(T value, ushort lane) {                                                            \
    const uint mask = msl_cuda::lane_mask();                                                       \
    return msl_cuda::shuffle_words(value, [=](uint word) { return INTRINSIC(mask, word, lane); }); \
  }
MSL_SHUFFLE(simd_shuffle, __shfl_sync)
MSL_SHUFFLE(simd_broadcast, __shfl_sync)
MSL_SHUFFLE(simd_shuffle_xor, __shfl_xor_sync)
MSL_SHUFFLE(simd_shuffle_down, __shfl_down_sync)
MSL_SHUFFLE(simd_shuffle_up, __shfl_up_sync)
template <class T>
MSL_FN T simd_broadcast_first(T value) {
  return simd_shuffle(value, 0);
}

#define MSL_REDUCE(NAME, EXPRESSION)                                        \
  template <class T>                                                        \
  MSL_FN T NAME(T value) {                                                  \
    return msl_cuda::reduce(value, [](T a, T b) { return T(EXPRESSION); }); \
  }
MSL_REDUCE(simd_sum, a + b)
MSL_REDUCE(simd_product, a* b)
MSL_REDUCE(simd_max, max(a, b))
MSL_REDUCE(simd_min, min(a, b))
MSL_REDUCE(simd_or, a | b)
MSL_REDUCE(simd_and, a& b)
MSL_REDUCE(simd_xor, a ^ b)

template <class T>
MSL_FN T simd_prefix_inclusive_sum(T value) {
  for (uint distance = 1; distance < 32; distance *= 2) {
    const T other = simd_shuffle_up(value, distance);
    if (msl_cuda::lane_index() >= distance) value = T(other + value);
  }
  return value;
}
template <class T>
MSL_FN T simd_prefix_exclusive_sum(T value) {
  const T before = simd_shuffle_up(simd_prefix_inclusive_sum(value), 1);
  return msl_cuda::lane_index() == 0 ? T(0) : before;
}

struct simd_vote {
  ulong bits;
  MSL_FN explicit simd_vote(ulong bits) : bits(bits) {}
  MSL_FN explicit operator ulong() const { return bits; }
  MSL_FN bool any() const { return bits != 0; }
};
MSL_FN simd_vote simd_ballot(bool condition) {
  return simd_vote(__ballot_sync(msl_cuda::lane_mask(), condition));
}
MSL_FN bool simd_any(bool condition) {
  return __any_sync(msl_cuda::lane_mask(), condition);
}
MSL_FN bool simd_all(bool condition) {
  return __all_sync(msl_cuda::lane_mask(), condition);
}

// Atomics: 32-bit integers

enum memory_order { memory_order_relaxed };
template <class T>
struct atomic {
  T value;
};
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;

#define MSL_ATOMIC(NAME, INTRINSIC)                                                             \
  template <class T>                                                                            \
  MSL_FN T NAME(atomic<T>* object, typename msl_cuda::same_as<T>::type operand, memory_order) { \
    return ::INTRINSIC(&object->value, operand);                                                \
  }
MSL_ATOMIC(atomic_fetch_add_explicit, atomicAdd)
MSL_ATOMIC(atomic_fetch_sub_explicit, atomicSub)
MSL_ATOMIC(atomic_fetch_max_explicit, atomicMax)
MSL_ATOMIC(atomic_fetch_min_explicit, atomicMin)
MSL_ATOMIC(atomic_fetch_or_explicit, atomicOr)
MSL_ATOMIC(atomic_fetch_and_explicit, atomicAnd)
MSL_ATOMIC(atomic_fetch_xor_explicit, atomicXor)
MSL_ATOMIC(atomic_exchange_explicit, atomicExch)
template <class T>
MSL_FN void atomic_store_explicit(atomic<T>* object, typename msl_cuda::same_as<T>::type value, memory_order) {
  *const_cast<volatile T*>(&object->value) = value;
}
template <class T>
MSL_FN T atomic_load_explicit(const atomic<T>* object, memory_order) {
  return *const_cast<const volatile T*>(&object->value);
}

}  // namespace metal

// Binding of a kernel's entry to its Metal function

namespace msl_cuda {

// Argument number Index of a function, and what it is a reference to
template <class Function, int Index>
struct argument_of;
template <class A, class... Rest>
struct argument_of<void (*)(A, Rest...), 0> {
  using type = A;
};
template <class A, class... Rest, int Index>
struct argument_of<void (*)(A, Rest...), Index> : argument_of<void (*)(Rest...), Index - 1> {};
template <class A>
struct without_reference;
template <class A>
struct without_reference<A&> {
  using type = A;
};

template <class Function, int Index>
using argument = typename argument_of<Function, Index>::type;
template <class Function, int Index>
using referred = typename without_reference<argument<Function, Index>>::type;

// One coordinate of a kernel argument that the hardware supplies, numbered as in torch_fused/metal/program.py
template <int Builtin>
MSL_FN unsigned coordinate(unsigned thread, unsigned threads, unsigned group, unsigned groups) {
  switch (Builtin) {
    case 0:
      return group * threads + thread;  // thread_position_in_grid
    case 1:
      return thread;  // thread_position_in_threadgroup
    case 2:
      return thread_index();  // thread_index_in_threadgroup
    case 3:
      return group;  // threadgroup_position_in_grid
    case 4:          // threads_per_threadgroup
    case 5:
      return threads;  // dispatch_threads_per_threadgroup
    case 6:
      return groups;  // threadgroups_per_grid
    case 7:
      return groups * threads;  // threads_per_grid
    case 8:
      return lane_index();  // thread_index_in_simdgroup
    case 9:
      return thread_index() / 32;  // simdgroup_index_in_threadgroup
    case 10:                       // simdgroups_per_threadgroup
    case 11:
      return (thread_count() + 31) / 32;  // dispatch_simdgroups_per_threadgroup
    default:
      return 32;  // threads_per_simdgroup
  }
}
template <int Builtin, class T>
MSL_FN T builtin() {
  using E = typename metal::vtraits<T>::E;
  const unsigned x = coordinate<Builtin>(threadIdx.x, blockDim.x, blockIdx.x, gridDim.x);
  if constexpr (metal::vtraits<T>::n == 1) {
    return T(x);
  } else {
    const unsigned y = coordinate<Builtin>(threadIdx.y, blockDim.y, blockIdx.y, gridDim.y);
    if constexpr (metal::vtraits<T>::n == 2) {
      return T(E(x), E(y));
    } else {
      return T(E(x), E(y), E(coordinate<Builtin>(threadIdx.z, blockDim.z, blockIdx.z, gridDim.z)));
    }
  }
}

}  // namespace msl_cuda
