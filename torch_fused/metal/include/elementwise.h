// How a function of numbers becomes one of vectors: element by element, scalars among the arguments repeated.
#pragma once

namespace metal {

// The vector type among arguments that all convert to it; no type, hence no overload, where there is none
template <class A, class V>
struct msl_fits {
  static constexpr bool v =
      vtraits<A>::is
          ? same_t<typename vtraits<A>::E, typename vtraits<V>::E>::v && vtraits<A>::n == vtraits<V>::n
          : convertible<A, typename vtraits<V>::E>::v && (is_integer<A>::v || !is_integer<typename vtraits<V>::E>::v);
};
template <class A, class... Rest>
struct msl_first_vector : msl_first_vector<Rest...> {};
template <class T, int N, class... Rest>
struct msl_first_vector<vec<T, N>, Rest...> {
  using type = vec<T, N>;
};
template <class T, int N, class... Rest>
struct msl_first_vector<packed<T, N>, Rest...> {
  using type = vec<T, N>;
};
template <class T, int Size, int... I, class... Rest>
struct msl_first_vector<swz<T, Size, I...>, Rest...> {
  using type = vec<T, int(sizeof...(I))>;
};
template <class A>
struct msl_first_vector<A> {};
template <class T, int N>
struct msl_first_vector<vec<T, N>> {
  using type = vec<T, N>;
};
template <class T, int N>
struct msl_first_vector<packed<T, N>> {
  using type = vec<T, N>;
};
template <class T, int Size, int... I>
struct msl_first_vector<swz<T, Size, I...>> {
  using type = vec<T, int(sizeof...(I))>;
};
template <class V, class... A>
struct msl_if_fits : eif<(msl_fits<A, V>::v && ...), V> {};
template <class Void, class... A>
struct msl_vector_of {};
template <class... A>
struct msl_vector_of<typename eif<(vtraits<A>::is || ...)>::type, A...>
    : msl_if_fits<typename msl_first_vector<A...>::type, A...> {};
template <class... A>
using vector_of = typename msl_vector_of<void, A...>::type;
// Of vectors of bfloat Metal has the relational functions only
template <class V>
struct msl_if_not_bfloat : eif<!same_t<typename vtraits<V>::E, bfloat>::v, V> {};
template <class... A>
using math_vector_of = typename msl_if_not_bfloat<vector_of<A...>>::type;

#define MSL_VECTOR_1(NAME) MSL_ELEMENTWISE_1(NAME, vector_of)
#define MSL_VECTOR_2(NAME) MSL_ELEMENTWISE_2(NAME, vector_of)
#define MSL_VECTOR_3(NAME) MSL_ELEMENTWISE_3(NAME, vector_of)
#define MSL_ELEMENTWISE_1(NAME, VECTOR_OF)                              \
  template <class A, class V = VECTOR_OF<A>>                            \
  MSL_FN auto NAME(const A& x) {                                        \
    const V a(x);                                                       \
    vec<decltype(NAME(a.d[0])), vtraits<V>::n> result;                  \
    for (int i = 0; i < vtraits<V>::n; i++) result.d[i] = NAME(a.d[i]); \
    return result;                                                      \
  }
#define MSL_ELEMENTWISE_2(NAME, VECTOR_OF)                                      \
  template <class A, class B, class V = VECTOR_OF<A, B>>                        \
  MSL_FN auto NAME(const A& x, const B& y) {                                    \
    const V a(x), b(y);                                                         \
    vec<decltype(NAME(a.d[0], b.d[0])), vtraits<V>::n> result;                  \
    for (int i = 0; i < vtraits<V>::n; i++) result.d[i] = NAME(a.d[i], b.d[i]); \
    return result;                                                              \
  }
#define MSL_ELEMENTWISE_3(NAME, VECTOR_OF)                                              \
  template <class A, class B, class C, class V = VECTOR_OF<A, B, C>>                    \
  MSL_FN auto NAME(const A& x, const B& y, const C& z) {                                \
    const V a(x), b(y), c(z);                                                           \
    vec<decltype(NAME(a.d[0], b.d[0], c.d[0])), vtraits<V>::n> result;                  \
    for (int i = 0; i < vtraits<V>::n; i++) result.d[i] = NAME(a.d[i], b.d[i], c.d[i]); \
    return result;                                                                      \
  }

// Functions of floats, for float and half, which rounds the float's result. A bfloat converts to float and gets a
// float. A template yields to a source's own function of bfloat.
#define MSL_BFLOAT class T, class = typename eif<same_t<T, bfloat>::v>::type
#define MSL_FLOAT_1(NAME, EXPRESSION) \
  MSL_FN float NAME(float x) {        \
    return EXPRESSION;                \
  }                                   \
  MSL_FN half NAME(half x) {          \
    return half(NAME(float(x)));      \
  }                                   \
  MSL_OF_BFLOAT_1(NAME)
#define MSL_FLOAT_2(NAME, EXPRESSION)      \
  MSL_FN float NAME(float x, float y) {    \
    return EXPRESSION;                     \
  }                                        \
  MSL_FN half NAME(half x, half y) {       \
    return half(NAME(float(x), float(y))); \
  }                                        \
  MSL_OF_BFLOAT_2(NAME)
#define MSL_FLOAT_3(NAME, EXPRESSION)                \
  MSL_FN float NAME(float x, float y, float z) {     \
    return EXPRESSION;                               \
  }                                                  \
  MSL_FN half NAME(half x, half y, half z) {         \
    return half(NAME(float(x), float(y), float(z))); \
  }                                                  \
  MSL_OF_BFLOAT_3(NAME)
#define MSL_OF_BFLOAT_1(NAME) \
  template <MSL_BFLOAT>       \
  MSL_FN float NAME(T x) {    \
    return NAME(float(x));    \
  }                           \
  MSL_ELEMENTWISE_1(NAME, math_vector_of)
#define MSL_OF_BFLOAT_2(NAME)        \
  template <MSL_BFLOAT>              \
  MSL_FN float NAME(T x, T y) {      \
    return NAME(float(x), float(y)); \
  }                                  \
  MSL_ELEMENTWISE_2(NAME, math_vector_of)
#define MSL_OF_BFLOAT_3(NAME)                  \
  template <MSL_BFLOAT>                        \
  MSL_FN float NAME(T x, T y, T z) {           \
    return NAME(float(x), float(y), float(z)); \
  }                                            \
  MSL_ELEMENTWISE_3(NAME, math_vector_of)

// Functions of integers of every type
#define MSL_FOR_INTEGERS(DECLARE) \
  DECLARE(char)                   \
  DECLARE(uchar)                  \
  DECLARE(short) DECLARE(ushort) DECLARE(int) DECLARE(uint) DECLARE(long) DECLARE(ulong)

}  // namespace metal
