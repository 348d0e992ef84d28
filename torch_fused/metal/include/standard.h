// What of Metal's standard library is the same on the host and on CUDA: constants, names of vectors, type traits. Comes
// after vector.h, the primitives of the target, types.h and its 16-bit floats.
#pragma once

#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define FLT_TRUE_MIN 0x1p-149f
#define FLT_DIG 6
#define FLT_MANT_DIG 24
#define FLT_RADIX 2
#define MAXFLOAT FLT_MAX
#define HUGE_VALF INFINITY
#define HALF_MAX half(65504.0f)
#define HALF_MIN half(6.103515625e-05f)
#define HALF_EPSILON half(0.0009765625f)
#define MAXHALF HALF_MAX
#define M_E_F 2.71828182845904523536028747135266250f
#define M_LOG2E_F 1.44269504088896340735992468100189214f
#define M_LOG10E_F 0.434294481903251827651128918916605082f
#define M_LN2_F 0.693147180559945309417232121458176568f
#define M_LN10_F 2.30258509299404568401799145468436421f
#define M_PI_F 3.14159265358979323846264338327950288f
#define M_PI_2_F 1.57079632679489661923132169163975144f
#define M_PI_4_F 0.785398163397448309615660845819875721f
#define M_1_PI_F 0.318309886183790671537767526745028724f
#define M_2_PI_F 0.636619772367581343075535053490057448f
#define M_2_SQRTPI_F 1.12837916709551257389615890312154517f
#define M_SQRT2_F 1.41421356237309504880168872420969808f
#define M_SQRT1_2_F 0.707106781186547524400844362104849039f
#define M_PI_H half(M_PI_F)
#define M_E_H half(M_E_F)
#define M_LN2_H half(M_LN2_F)
#define M_LOG2E_H half(M_LOG2E_F)
#define M_SQRT2_H half(M_SQRT2_F)
#define M_SQRT1_2_H half(M_SQRT1_2_F)
#define CHAR_BIT 8
#define SCHAR_MAX 127
#define SCHAR_MIN (-128)
#define UCHAR_MAX 255
#define CHAR_MAX SCHAR_MAX
#define CHAR_MIN SCHAR_MIN
#define SHRT_MAX 32767
#define SHRT_MIN (-32768)
#define USHRT_MAX 65535
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define LONG_MAX 9223372036854775807l
#define LONG_MIN (-9223372036854775807l - 1)
#define ULONG_MAX 18446744073709551615ul

namespace metal {

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
#define MSL_PACKED_VECTORS(T)         \
  using packed_##T##2 = packed<T, 2>; \
  using packed_##T##3 = packed<T, 3>; \
  using packed_##T##4 = packed<T, 4>;
MSL_PACKED_VECTORS(float)
MSL_PACKED_VECTORS(half)
MSL_PACKED_VECTORS(bfloat)
MSL_PACKED_VECTORS(int)
MSL_PACKED_VECTORS(uint)
MSL_PACKED_VECTORS(short)
MSL_PACKED_VECTORS(ushort)
MSL_PACKED_VECTORS(char)
MSL_PACKED_VECTORS(uchar)
MSL_PACKED_VECTORS(long)
MSL_PACKED_VECTORS(ulong)

template <class T>
struct same_as {  // keeps an argument out of template deduction
  using type = T;
};

// Type traits and limits

template <class T, T Value>
struct integral_constant {
  static constexpr T value = Value;
  using value_type = T;
  using type = integral_constant;
  MSL_FN constexpr operator T() const { return Value; }
};
template <bool Value>
using bool_constant = integral_constant<bool, Value>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <class T>
struct remove_const {
  using type = T;
};
template <class T>
struct remove_const<const T> {
  using type = T;
};
template <class T>
struct remove_volatile {
  using type = T;
};
template <class T>
struct remove_volatile<volatile T> {
  using type = T;
};
template <class T>
struct remove_cv : remove_const<typename remove_volatile<T>::type> {};
template <class T>
struct remove_reference {
  using type = T;
};
template <class T>
struct remove_reference<T&> {
  using type = T;
};
template <class T>
struct remove_reference<T&&> {
  using type = T;
};
template <class T>
struct remove_pointer {
  using type = T;
};
template <class T>
struct remove_pointer<T*> {
  using type = T;
};
template <class T>
struct decay : remove_cv<typename remove_reference<T>::type> {};
template <class T>
struct remove_addrspace {  // of which C++ has none
  using type = T;
};
template <class T>
using remove_addrspace_t = T;
template <class T>
using remove_const_t = typename remove_const<T>::type;
template <class T>
using remove_cv_t = typename remove_cv<T>::type;
template <class T>
using remove_reference_t = typename remove_reference<T>::type;
template <class T>
using remove_pointer_t = typename remove_pointer<T>::type;
template <class T>
using decay_t = typename decay<T>::type;

template <class A, class B>
struct is_same : bool_constant<same_t<A, B>::v> {};
template <class T>
struct is_integral : bool_constant<is_integer<remove_cv_t<T>>::v> {};
template <class T>
struct is_floating_point : bool_constant<same_t<remove_cv_t<T>, float>::v || is_half_type<remove_cv_t<T>>::v> {};
template <class T>
struct is_arithmetic : bool_constant<is_integral<T>::value || is_floating_point<T>::value> {};
template <class T>
struct is_scalar : is_arithmetic<T> {};
template <class T>
struct is_vector : bool_constant<vtraits<remove_cv_t<T>>::is> {};
template <class T>
struct vec_elements : integral_constant<short, vtraits<remove_cv_t<T>>::n> {};
template <class T>
struct is_pointer : false_type {};
template <class T>
struct is_pointer<T*> : true_type {};
template <class T>
struct is_const : false_type {};
template <class T>
struct is_const<const T> : true_type {};
template <class T>
constexpr bool msl_is_signed() {
  if constexpr (is_arithmetic<T>::value) return same_t<T, half>::v || is_half_type<T>::v || T(-1) < T(0);
  return false;
}
template <class T>
struct is_signed : bool_constant<msl_is_signed<remove_cv_t<T>>()> {};
template <class T>
struct is_unsigned : bool_constant<is_integral<T>::value && !is_signed<T>::value> {};
template <class From, class To>
struct is_convertible : bool_constant<convertible<From, To>::v> {};
template <class Base, class Derived>
struct is_base_of : bool_constant<__is_base_of(Base, Derived)> {};
template <class T>
struct is_enum : bool_constant<__is_enum(T)> {};
template <class A, class B>
constexpr bool is_same_v = is_same<A, B>::value;
template <class T>
constexpr bool is_integral_v = is_integral<T>::value;
template <class T>
constexpr bool is_floating_point_v = is_floating_point<T>::value;
template <class T>
constexpr bool is_arithmetic_v = is_arithmetic<T>::value;
template <class T>
constexpr bool is_scalar_v = is_scalar<T>::value;
template <class T>
constexpr bool is_vector_v = is_vector<T>::value;
template <class T>
constexpr bool is_signed_v = is_signed<T>::value;
template <class T>
constexpr bool is_unsigned_v = is_unsigned<T>::value;
template <class T>
constexpr bool is_pointer_v = is_pointer<T>::value;
template <class T>
constexpr bool is_const_v = is_const<T>::value;
template <class From, class To>
constexpr bool is_convertible_v = is_convertible<From, To>::value;
template <class Base, class Derived>
constexpr bool is_base_of_v = is_base_of<Base, Derived>::value;

template <bool Condition, class T = void>
using enable_if = eif<Condition, T>;
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
template <class...>
struct conjunction : true_type {};
template <class A, class... Rest>
struct conjunction<A, Rest...> : conditional_t<bool(A::value), conjunction<Rest...>, A> {};
template <class...>
struct disjunction : false_type {};
template <class A, class... Rest>
struct disjunction<A, Rest...> : conditional_t<bool(A::value), A, disjunction<Rest...>> {};
template <class A>
struct negation : bool_constant<!A::value> {};
template <class... A>
using _conjunction = conjunction<A...>;  // a source may know of it
template <class... A>
using _disjunction = disjunction<A...>;
template <class A>
using _negation = negation<A>;
template <class... A>
constexpr bool conjunction_v = conjunction<A...>::value;
template <class... A>
constexpr bool disjunction_v = disjunction<A...>::value;
template <class A>
constexpr bool negation_v = negation<A>::value;

template <class T>
struct make_unsigned {
  using type = T;
};
template <class T>
struct make_signed {
  using type = T;
};
#define MSL_SIGNS(SIGNED, UNSIGNED) \
  template <>                       \
  struct make_unsigned<SIGNED> {    \
    using type = UNSIGNED;          \
  };                                \
  template <>                       \
  struct make_signed<UNSIGNED> {    \
    using type = SIGNED;            \
  };
MSL_SIGNS(char, uchar)
MSL_SIGNS(short, ushort)
MSL_SIGNS(int, uint)
MSL_SIGNS(long, ulong)
template <>
struct make_unsigned<signed char> {
  using type = uchar;
};
template <class T>
using make_unsigned_t = typename make_unsigned<T>::type;
template <class T>
using make_signed_t = typename make_signed<T>::type;

template <class T>
typename remove_reference<T>::type&& declval();

template <class T>
struct _numeric_limits_impl {  // a source may know of it
  static constexpr bool is_specialized = false;
};
template <class T>
struct numeric_limits : _numeric_limits_impl<T> {};
#define MSL_INTEGER_LIMITS(T, MIN, MAX)                                                                      \
  template <>                                                                                                \
  struct numeric_limits<T> {                                                                                 \
    static constexpr bool is_specialized = true, is_integer = true, is_exact = true, has_infinity = false,   \
                          has_quiet_NaN = false, is_signed = T(MIN) < T(0);                                  \
    static constexpr int radix = 2, digits = sizeof(T) * 8 - is_signed, digits10 = digits * 30103l / 100000; \
    static constexpr T min() {                                                                               \
      return MIN;                                                                                            \
    }                                                                                                        \
    static constexpr T lowest() {                                                                            \
      return MIN;                                                                                            \
    }                                                                                                        \
    static constexpr T max() {                                                                               \
      return MAX;                                                                                            \
    }                                                                                                        \
    static constexpr T infinity() {                                                                          \
      return 0;                                                                                              \
    }                                                                                                        \
  };
MSL_INTEGER_LIMITS(char, CHAR_MIN, CHAR_MAX)
MSL_INTEGER_LIMITS(int8_t, SCHAR_MIN, SCHAR_MAX)
MSL_INTEGER_LIMITS(uchar, 0, UCHAR_MAX)
MSL_INTEGER_LIMITS(short, SHRT_MIN, SHRT_MAX)
MSL_INTEGER_LIMITS(ushort, 0, USHRT_MAX)
MSL_INTEGER_LIMITS(int, INT_MIN, INT_MAX)
MSL_INTEGER_LIMITS(uint, 0, UINT_MAX)
MSL_INTEGER_LIMITS(long, LONG_MIN, LONG_MAX)
MSL_INTEGER_LIMITS(ulong, 0, ULONG_MAX)
template <>
struct numeric_limits<bool> {
  static constexpr bool is_specialized = true, is_integer = true, is_signed = false;
  static constexpr bool min() { return false; }
  static constexpr bool lowest() { return false; }
  static constexpr bool max() { return true; }
};
#define MSL_FLOAT_LIMITS(T, CONSTEXPR, MIN, MAX, EPSILON, DENORMAL, DIGITS)                                 \
  template <>                                                                                               \
  struct numeric_limits<T> {                                                                                \
    static constexpr bool is_specialized = true, is_integer = false, is_exact = false, has_infinity = true, \
                          has_quiet_NaN = true, is_signed = true;                                           \
    static constexpr int radix = 2, digits = DIGITS;                                                        \
    static CONSTEXPR T min() {                                                                              \
      return T(MIN);                                                                                        \
    }                                                                                                       \
    static CONSTEXPR T lowest() {                                                                           \
      return T(-MAX);                                                                                       \
    }                                                                                                       \
    static CONSTEXPR T max() {                                                                              \
      return T(MAX);                                                                                        \
    }                                                                                                       \
    static CONSTEXPR T epsilon() {                                                                          \
      return T(EPSILON);                                                                                    \
    }                                                                                                       \
    static CONSTEXPR T denorm_min() {                                                                       \
      return T(DENORMAL);                                                                                   \
    }                                                                                                       \
    static CONSTEXPR T infinity() {                                                                         \
      return T(INFINITY);                                                                                   \
    }                                                                                                       \
    static CONSTEXPR T quiet_NaN() {                                                                        \
      return T(NAN);                                                                                        \
    }                                                                                                       \
  };
MSL_FLOAT_LIMITS(float, constexpr, FLT_MIN, FLT_MAX, FLT_EPSILON, FLT_TRUE_MIN, 24)
MSL_FLOAT_LIMITS(half, MSL_CONSTEXPR_HALF, 6.103515625e-05f, 65504.0f, 0.0009765625f, 0x1p-24f, 11)
MSL_FLOAT_LIMITS(bfloat, MSL_CONSTEXPR_HALF, FLT_MIN, 3.38953139e+38f, 0.0078125f, 0x1p-133f, 8)

template <class T, size_t N>
struct array {
  T elements[N];
  MSL_FN T& operator[](size_t i) { return elements[i]; }
  MSL_FN const T& operator[](size_t i) const { return elements[i]; }
  MSL_FN constexpr size_t size() const { return N; }
  MSL_FN constexpr size_t max_size() const { return N; }
  MSL_FN constexpr bool empty() const { return N == 0; }
  MSL_FN T* data() { return elements; }
  MSL_FN const T* data() const { return elements; }
  MSL_FN T* begin() { return elements; }
  MSL_FN const T* begin() const { return elements; }
  MSL_FN T* end() { return elements + N; }
  MSL_FN const T* end() const { return elements + N; }
  MSL_FN T& front() { return elements[0]; }
  MSL_FN const T& front() const { return elements[0]; }
  MSL_FN T& back() { return elements[N - 1]; }
  MSL_FN const T& back() const { return elements[N - 1]; }
};

// A value that is the same in all threads
template <class T>
using uniform = T;
template <class T>
MSL_FN constexpr T make_uniform(T x) {
  return x;
}

// Barriers, votes and atomics: their types

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
MSL_FN mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(int(a) | int(b));
}

struct simd_vote {
  ulong bits;
  MSL_FN explicit simd_vote(ulong bits) : bits(bits) {}
  MSL_FN explicit operator ulong() const { return bits; }
  MSL_FN bool any() const { return bits != 0; }
  MSL_FN bool all() const { return bits == 0xffffffff; }
};

struct quad_vote {
  ulong bits;
  MSL_FN explicit quad_vote(ulong bits) : bits(bits) {}
  MSL_FN explicit operator ulong() const { return bits; }
  MSL_FN bool any() const { return bits != 0; }
  MSL_FN bool all() const { return bits == 15; }
};

enum memory_order { memory_order_relaxed };
template <class T>
struct atomic {
  T value;
};
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
using atomic_float = atomic<float>;
using atomic_bool = atomic<bool>;
using atomic_ulong = atomic<ulong>;

}  // namespace metal
