// Metal's standard library as declarations for clang's C++ for OpenCL, which has real address spaces: a kernel that
// type-checks against it has the address spaces, overloads and conversions Apple's compiler asks for. Never run.
#pragma once

#pragma OPENCL EXTENSION cl_khr_fp16 : enable

// Metal's words for address spaces; OpenCL's keywords and built-in names, free to use in Metal
#define device __global
#define thread __private
#define threadgroup __local
#define constant __constant
#define local msl_local
#define global msl_global
#define private msl_private
#define generic msl_generic
#define pipe msl_pipe
#define uniform msl_uniform
#define complex msl_complex
#define imaginary msl_imaginary
#define read_only msl_read_only
#define write_only msl_write_only
#define read_write msl_read_write
#define atomic_int msl_atomic_int
#define atomic_uint msl_atomic_uint
#define atomic_fetch_add_explicit msl_atomic_fetch_add_explicit
#define atomic_fetch_sub_explicit msl_atomic_fetch_sub_explicit
#define atomic_fetch_max_explicit msl_atomic_fetch_max_explicit
#define atomic_fetch_min_explicit msl_atomic_fetch_min_explicit
#define atomic_fetch_or_explicit msl_atomic_fetch_or_explicit
#define atomic_fetch_and_explicit msl_atomic_fetch_and_explicit
#define atomic_fetch_xor_explicit msl_atomic_fetch_xor_explicit
#define atomic_exchange_explicit msl_atomic_exchange_explicit
#define atomic_store_explicit msl_atomic_store_explicit
#define atomic_load_explicit msl_atomic_load_explicit
#define memory_order msl_memory_order
#define memory_order_relaxed msl_memory_order_relaxed

// OpenCL allows such a variable in its own kernels only
#define MSL_TG_VAR(ID, LINE, NAME, TYPE, ...) __local TYPE(&NAME) __VA_ARGS__ = *(__local TYPE(*) __VA_ARGS__)0

#define INFINITY __builtin_inff()
#define NAN __builtin_bit_cast(float, 0x7fc00000)
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define MAXFLOAT FLT_MAX
#define HALF_MAX half(65504.0f)
#define M_PI_F 3.14159265358979f
#define M_LOG2E_F 1.44269504088896f
#define M_LN2_F 0.69314718055995f

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef __bf16 bfloat;

namespace metal {

// Vectors are clang's own; a comparison of two makes a vector of int

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));
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
using bool2 = int2;
using bool3 = int3;
using bool4 = int4;

template <class T>
struct packed3 {
  T x, y, z;
  operator vec<T, 3>() const;
  void operator=(vec<T, 3>);
};
template <class T>
struct packed4 {
  T x, y, z, w;
  operator vec<T, 4>() const;
  void operator=(vec<T, 4>);
};
using packed_float3 = packed3<float>;
using packed_float4 = packed4<float>;
using packed_half3 = packed3<half>;
using packed_half4 = packed4<half>;

// Type traits and limits

template <bool Condition, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  using type = T;
};
template <bool Condition, class T = void>
using enable_if_t = typename enable_if<Condition, T>::type;
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
template <class A, class B>
struct is_same {
  static constexpr bool value = false;
};
template <class A>
struct is_same<A, A> {
  static constexpr bool value = true;
};
template <class A, class B>
constexpr bool is_same_v = is_same<A, B>::value;

template <class T>
struct numeric_limits {
  static constexpr T min();
  static constexpr T lowest();
  static constexpr T max();
  static constexpr T infinity();
  static constexpr T quiet_NaN();
};

// Element and width of a vector; a scalar is its own element

template <class T>
struct msl_vector {
  using element = T;
  static constexpr int width = 1;
};
template <class T, int N>
struct msl_vector<T __attribute__((ext_vector_type(N)))> {
  using element = T;
  static constexpr int width = N;
};

// What emit_lint writes for a vector's constructor: as many elements as it has, one scalar, or one vector as wide
template <class... A>
constexpr int msl_width = (0 + ... + msl_vector<A>::width);
template <class V, class... A,
          class = enable_if_t<(sizeof...(A) > 0) &&
                              (msl_width<A...> == msl_vector<V>::width || (sizeof...(A) == 1 && msl_width<A...> == 1))>>
V msl_make(A... elements);

template <class To, class From, class = enable_if_t<sizeof(To) == sizeof(From)>>
To as_type(From from);

// Mathematics. Metal has no functions of bfloat: convert to float first.

#define MSL_FOR_WIDTHS(DECLARE, T) DECLARE(T) DECLARE(T##2) DECLARE(T##3) DECLARE(T##4)
#define MSL_FOR_FLOATS(DECLARE) MSL_FOR_WIDTHS(DECLARE, float) MSL_FOR_WIDTHS(DECLARE, half)
#define MSL_FOR_SIGNED(DECLARE) \
  MSL_FOR_WIDTHS(DECLARE, int)  \
  MSL_FOR_WIDTHS(DECLARE, short) MSL_FOR_WIDTHS(DECLARE, char) MSL_FOR_WIDTHS(DECLARE, long)
#define MSL_FOR_UNSIGNED(DECLARE) \
  MSL_FOR_WIDTHS(DECLARE, uint)   \
  MSL_FOR_WIDTHS(DECLARE, ushort) MSL_FOR_WIDTHS(DECLARE, uchar) MSL_FOR_WIDTHS(DECLARE, ulong)

// The functions of which fast:: and precise:: hold variants
#define MSL_VARIED(T)    \
  T acos(T);             \
  T acosh(T);            \
  T asin(T);             \
  T asinh(T);            \
  T atan(T);             \
  T atanh(T);            \
  T ceil(T);             \
  T cos(T);              \
  T cosh(T);             \
  T cospi(T);            \
  T exp(T);              \
  T exp2(T);             \
  T exp10(T);            \
  T fabs(T);             \
  T abs(T);              \
  T floor(T);            \
  T fract(T);            \
  T log(T);              \
  T log2(T);             \
  T log10(T);            \
  T rint(T);             \
  T round(T);            \
  T rsqrt(T);            \
  T saturate(T);         \
  T sign(T);             \
  T sin(T);              \
  T sinh(T);             \
  T sinpi(T);            \
  T sqrt(T);             \
  T tan(T);              \
  T tanh(T);             \
  T tanpi(T);            \
  T trunc(T);            \
  T atan2(T, T);         \
  T copysign(T, T);      \
  T divide(T, T);        \
  T fdim(T, T);          \
  T fmax(T, T);          \
  T fmin(T, T);          \
  T fmod(T, T);          \
  T max(T, T);           \
  T min(T, T);           \
  T nextafter(T, T);     \
  T pow(T, T);           \
  T powr(T, T);          \
  T step(T, T);          \
  T clamp(T, T, T);      \
  T fma(T, T, T);        \
  T fmax3(T, T, T);      \
  T fmedian3(T, T, T);   \
  T fmin3(T, T, T);      \
  T max3(T, T, T);       \
  T median3(T, T, T);    \
  T min3(T, T, T);       \
  T mix(T, T, T);        \
  T smoothstep(T, T, T); \
  T sincos(T, __private T&);
#define MSL_INTEGER(T)           \
  T abs(T);                      \
  T clz(T);                      \
  T ctz(T);                      \
  T popcount(T);                 \
  T reverse_bits(T);             \
  T addsat(T, T);                \
  T hadd(T, T);                  \
  T max(T, T);                   \
  T min(T, T);                   \
  T mulhi(T, T);                 \
  T rhadd(T, T);                 \
  T rotate(T, T);                \
  T subsat(T, T);                \
  T clamp(T, T, T);              \
  T madhi(T, T, T);              \
  T madsat(T, T, T);             \
  T max3(T, T, T);               \
  T median3(T, T, T);            \
  T min3(T, T, T);               \
  T extract_bits(T, uint, uint); \
  T insert_bits(T, T, uint, uint);

MSL_FOR_FLOATS(MSL_VARIED)
MSL_FOR_SIGNED(MSL_INTEGER)
MSL_FOR_UNSIGNED(MSL_INTEGER)
namespace fast {
MSL_FOR_WIDTHS(MSL_VARIED, float)
MSL_FOR_WIDTHS(MSL_VARIED, half)
}  // namespace fast
namespace precise {
MSL_FOR_WIDTHS(MSL_VARIED, float)
MSL_FOR_WIDTHS(MSL_VARIED, half)
}  // namespace precise
#define MSL_24_BITS(T) \
  T mul24(T, T);       \
  T mad24(T, T, T);
MSL_FOR_WIDTHS(MSL_24_BITS, int)
MSL_FOR_WIDTHS(MSL_24_BITS, uint)
#define MSL_EXPONENTS(T, I) \
  T frexp(T, __private I&); \
  T ldexp(T, I);            \
  I ilogb(T);
MSL_EXPONENTS(float, int)
MSL_EXPONENTS(float2, int2)
MSL_EXPONENTS(float3, int3)
MSL_EXPONENTS(float4, int4)
MSL_EXPONENTS(half, int)
MSL_EXPONENTS(half2, int2)
MSL_EXPONENTS(half3, int3)
MSL_EXPONENTS(half4, int4)
#define MSL_ABSDIFF(S, U) \
  U absdiff(S, S);        \
  U absdiff(U, U);
MSL_ABSDIFF(int, uint)
MSL_ABSDIFF(short, ushort)
MSL_ABSDIFF(char, uchar)
MSL_ABSDIFF(long, ulong)

#define MSL_RELATIONS(T, B) \
  B isnan(T);               \
  B isinf(T);               \
  B isfinite(T);            \
  B isnormal(T);            \
  B signbit(T);             \
  B isordered(T, T);        \
  B isunordered(T, T);
MSL_RELATIONS(float, bool)
MSL_RELATIONS(float2, bool2)
MSL_RELATIONS(float3, bool3)
MSL_RELATIONS(float4, bool4)
MSL_RELATIONS(half, bool)
MSL_RELATIONS(half2, bool2)
MSL_RELATIONS(half3, bool3)
MSL_RELATIONS(half4, bool4)
#define MSL_GEOMETRY_OF(T, V) \
  T dot(V, V);                \
  T length(V);                \
  T length_squared(V);        \
  T distance(V, V);           \
  T distance_squared(V, V);   \
  V normalize(V);             \
  V reflect(V, V);            \
  V refract(V, V, T);         \
  V faceforward(V, V, V);
#define MSL_GEOMETRY(T)    \
  MSL_GEOMETRY_OF(T, T##2) \
  MSL_GEOMETRY_OF(T, T##3) \
  MSL_GEOMETRY_OF(T, T##4) \
  T##3 cross(T##3, T##3);
MSL_GEOMETRY(float)
MSL_GEOMETRY(half)

template <class T>
T select(T, T, bool);
template <class T, int N>
vec<T, N> select(vec<T, N>, vec<T, N>, vec<int, N>);
template <int N>
bool any(vec<int, N>);
template <int N>
bool all(vec<int, N>);

// Threads

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
mem_flags operator|(mem_flags, mem_flags);
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

// Simdgroup functions take numbers of 32 bits and less, bfloat excepted, and vectors of them

template <class T>
constexpr bool msl_is_simd_element =
    is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, int> || is_same_v<T, uint> || is_same_v<T, short> ||
    is_same_v<T, ushort> || is_same_v<T, char> || is_same_v<T, uchar>;
template <class T>
using msl_simd_value = enable_if_t<msl_is_simd_element<typename msl_vector<T>::element>, T>;
#define MSL_SIMD(NAME) \
  template <class T>   \
  msl_simd_value<T> NAME(T);
#define MSL_SIMD_LANE(NAME) \
  template <class T>        \
  msl_simd_value<T> NAME(T, ushort);
MSL_SIMD(simd_sum)
MSL_SIMD(simd_product)
MSL_SIMD(simd_max)
MSL_SIMD(simd_min)
MSL_SIMD(simd_or)
MSL_SIMD(simd_and)
MSL_SIMD(simd_xor)
MSL_SIMD(simd_broadcast_first)
MSL_SIMD(simd_prefix_exclusive_sum)
MSL_SIMD(simd_prefix_inclusive_sum)
MSL_SIMD(simd_prefix_exclusive_product)
MSL_SIMD(simd_prefix_inclusive_product)
MSL_SIMD(quad_sum)
MSL_SIMD(quad_product)
MSL_SIMD(quad_max)
MSL_SIMD(quad_min)
MSL_SIMD(quad_or)
MSL_SIMD(quad_and)
MSL_SIMD(quad_xor)
MSL_SIMD(quad_broadcast_first)
MSL_SIMD(quad_prefix_exclusive_sum)
MSL_SIMD(quad_prefix_inclusive_sum)
MSL_SIMD(quad_prefix_exclusive_product)
MSL_SIMD(quad_prefix_inclusive_product)
MSL_SIMD_LANE(simd_shuffle)
MSL_SIMD_LANE(simd_broadcast)
MSL_SIMD_LANE(simd_shuffle_xor)
MSL_SIMD_LANE(simd_shuffle_down)
MSL_SIMD_LANE(simd_shuffle_up)
MSL_SIMD_LANE(simd_shuffle_rotate_down)
MSL_SIMD_LANE(simd_shuffle_rotate_up)
MSL_SIMD_LANE(quad_shuffle)
MSL_SIMD_LANE(quad_broadcast)
MSL_SIMD_LANE(quad_shuffle_xor)
MSL_SIMD_LANE(quad_shuffle_down)
MSL_SIMD_LANE(quad_shuffle_up)
MSL_SIMD_LANE(quad_shuffle_rotate_down)
MSL_SIMD_LANE(quad_shuffle_rotate_up)

template <class T, int C, int R>
struct simdgroup_matrix {
  vec<T, 2> own;
  thread vec<T, 2>& thread_elements();
};
template <class T>
void simdgroup_multiply_accumulate(thread simdgroup_matrix<T, 8, 8>& d, thread const simdgroup_matrix<T, 8, 8>& a,
                                   thread const simdgroup_matrix<T, 8, 8>& b,
                                   thread const simdgroup_matrix<T, 8, 8>& c);
#define MSL_SIMD_FILL(NAME) \
  template <class T>        \
  msl_simd_value<T> NAME(T, T, ushort, ushort = 32);
MSL_SIMD_FILL(simd_shuffle_and_fill_down)
MSL_SIMD_FILL(simd_shuffle_and_fill_up)
MSL_SIMD_FILL(quad_shuffle_and_fill_down)
MSL_SIMD_FILL(quad_shuffle_and_fill_up)

struct simd_vote {
  explicit simd_vote(ulong);
  explicit operator ulong() const;
  bool any() const;
  bool all() const;
};
simd_vote simd_ballot(bool);
simd_vote simd_active_threads_mask();
bool simd_is_first();
bool simd_is_helper_thread();
bool simd_any(bool);
bool simd_all(bool);

// Atomics: 32-bit integers in device and threadgroup memory, relaxed

enum memory_order { memory_order_relaxed };
template <class T>
struct atomic {
  T value;
};
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;

template <class T>
struct msl_same {  // keeps an argument out of template deduction
  using type = T;
};
#define MSL_ATOMIC(NAME)                                                          \
  template <class T>                                                              \
  T NAME(volatile __global atomic<T>*, typename msl_same<T>::type, memory_order); \
  template <class T>                                                              \
  T NAME(volatile __local atomic<T>*, typename msl_same<T>::type, memory_order);
MSL_ATOMIC(atomic_fetch_add_explicit)
MSL_ATOMIC(atomic_fetch_sub_explicit)
MSL_ATOMIC(atomic_fetch_max_explicit)
MSL_ATOMIC(atomic_fetch_min_explicit)
MSL_ATOMIC(atomic_fetch_or_explicit)
MSL_ATOMIC(atomic_fetch_and_explicit)
MSL_ATOMIC(atomic_fetch_xor_explicit)
MSL_ATOMIC(atomic_exchange_explicit)
template <class T>
void atomic_store_explicit(volatile __global atomic<T>*, typename msl_same<T>::type, memory_order);
template <class T>
void atomic_store_explicit(volatile __local atomic<T>*, typename msl_same<T>::type, memory_order);
template <class T>
T atomic_load_explicit(const volatile __global atomic<T>*, memory_order);
template <class T>
T atomic_load_explicit(const volatile __local atomic<T>*, memory_order);

}  // namespace metal

// Vector types are visible without `using namespace metal`
#define MSL_VISIBLE(T) \
  using metal::T##2;   \
  using metal::T##3;   \
  using metal::T##4;
MSL_VISIBLE(float)
MSL_VISIBLE(half)
MSL_VISIBLE(bfloat)
MSL_VISIBLE(int)
MSL_VISIBLE(uint)
MSL_VISIBLE(short)
MSL_VISIBLE(ushort)
MSL_VISIBLE(char)
MSL_VISIBLE(uchar)
MSL_VISIBLE(long)
MSL_VISIBLE(ulong)
MSL_VISIBLE(bool)
