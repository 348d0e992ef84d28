// Metal's vector types for compilers that have none: shared by the emulator's metal_stdlib and by cuda.h.
// Operands of one operator have the same element type and width, or one of them is a scalar, as in Metal.
#pragma once

#ifdef __CUDACC__
#define MSL_FN __device__ __forceinline__
#define MSL_ANY __device__
#else
#define MSL_FN inline __attribute__((always_inline))
#define MSL_ANY
#endif

namespace metal {

template <class T, int N>
struct vec;
template <class T, int Size, int... I>
struct swz;

// Type traits, as no standard header is at hand

template <bool Condition, class T = void>
struct eif {};
template <class T>
struct eif<true, T> {
  using type = T;
};

template <class A, class B>
struct same_t {
  static constexpr bool v = false;
};
template <class A>
struct same_t<A, A> {
  static constexpr bool v = true;
};

template <class To>
MSL_ANY void msl_accept(To);
template <class From>
MSL_ANY From msl_make();
template <class From, class To, class = void>
struct convertible {
  static constexpr bool v = false;
};
template <class From, class To>
struct convertible<From, To, decltype(msl_accept<To>(msl_make<From>()))> {
  static constexpr bool v = true;
};

// Element type E and width n; a scalar is its own element
template <class A>
struct vtraits {
  static constexpr bool is = false;
  using E = A;
  static constexpr int n = 1;
};
template <class T, int N>
struct vtraits<vec<T, N>> {
  static constexpr bool is = true;
  using E = T;
  static constexpr int n = N;
};
template <class T, int Size, int... I>
struct vtraits<swz<T, Size, I...>> {
  static constexpr bool is = true;
  using E = T;
  static constexpr int n = sizeof...(I);
};

// A swizzle such as v.xz: a view of elements I... of the vector it is a member of
template <class T, int Size, int... I>
struct swz {
  using value = vec<T, int(sizeof...(I))>;
  T d[Size];

  swz() = default;
  swz(const swz&) = default;
  MSL_FN swz& operator=(const swz& v) {  // the elements in view alone
    *this = value(v);
    return *this;
  }
  MSL_FN operator value() const {
    value result;
    int k = 0;
    ((result.d[k++] = d[I]), ...);
    return result;
  }
  MSL_FN void operator=(const value& v) {
    int k = 0;
    ((d[I] = v.d[k++]), ...);
  }
  MSL_FN void operator+=(const value& v) { *this = value(*this) + v; }
  MSL_FN void operator-=(const value& v) { *this = value(*this) - v; }
  MSL_FN void operator*=(const value& v) { *this = value(*this) * v; }
};

// A vector's storage: three elements are aligned like four, and an assignment copies it in one piece
template <class T, int N>
struct alignas((N == 3 ? 4 : N) * sizeof(T)) elements {
  T d[N];
};

// Constructors, assignment and subscripts of every width. A scalar converts implicitly, another vector does not.
#define MSL_VEC_COMMON(N)                                                                                     \
  vec() = default;                                                                                            \
  vec(const vec&) = default;                                                                                  \
  MSL_FN vec& operator=(const vec& v) {                                                                       \
    whole = v.whole;                                                                                          \
    return *this;                                                                                             \
  }                                                                                                           \
  MSL_FN vec(T s) {                                                                                           \
    for (int i = 0; i < N; i++) d[i] = s;                                                                     \
  }                                                                                                           \
  template <class U, class = typename eif<!vtraits<U>::is && !same_t<U, T>::v && convertible<U, T>::v>::type> \
  MSL_FN vec(U s) : vec(T(s)) {}                                                                              \
  template <class U, class = typename eif<!same_t<U, T>::v>::type>                                            \
  MSL_FN explicit vec(vec<U, N> v) {                                                                          \
    for (int i = 0; i < N; i++) d[i] = T(v.d[i]);                                                             \
  }                                                                                                           \
  template <class U, int Size, int... I, class = typename eif<!same_t<U, T>::v && sizeof...(I) == N>::type>   \
  MSL_FN explicit vec(const swz<U, Size, I...>& v) : vec(vec<U, N>(v)) {}                                     \
  MSL_FN T& operator[](int i) {                                                                               \
    return d[i];                                                                                              \
  }                                                                                                           \
  MSL_FN const T& operator[](int i) const {                                                                   \
    return d[i];                                                                                              \
  }

template <class T>
struct vec<T, 2> {
  union {
    T d[2];
    elements<T, 2> whole;
    struct {
      T x, y;
    };
    struct {
      T r, g;
    };
    swz<T, 2, 0, 1> xy;
    swz<T, 2, 1, 0> yx;
    swz<T, 2, 0, 0> xx;
    swz<T, 2, 1, 1> yy;
  };
  MSL_VEC_COMMON(2)
  MSL_FN vec(T a, T b) : d{a, b} {}
};

template <class T>
struct vec<T, 3> {
  union {
    T d[3];
    elements<T, 3> whole;
    struct {
      T x, y, z;
    };
    struct {
      T r, g, b;
    };
    swz<T, 3, 0, 1> xy;
    swz<T, 3, 1, 2> yz;
    swz<T, 3, 0, 2> xz;
    swz<T, 3, 0, 1, 2> xyz;
    swz<T, 3, 2, 1, 0> zyx;
  };
  MSL_VEC_COMMON(3)
  MSL_FN vec(T a, T b, T c) : d{a, b, c} {}
  MSL_FN vec(vec<T, 2> ab, T c) : d{ab.d[0], ab.d[1], c} {}
  MSL_FN vec(T a, vec<T, 2> bc) : d{a, bc.d[0], bc.d[1]} {}
};

template <class T>
struct vec<T, 4> {
  union {
    T d[4];
    elements<T, 4> whole;
    struct {
      T x, y, z, w;
    };
    struct {
      T r, g, b, a;
    };
    swz<T, 4, 0, 1> xy;
    swz<T, 4, 2, 3> zw;
    swz<T, 4, 1, 2> yz;
    swz<T, 4, 0, 2> xz;
    swz<T, 4, 1, 3> yw;
    swz<T, 4, 1, 0> yx;
    swz<T, 4, 3, 2> wz;
    swz<T, 4, 0, 1, 2> xyz;
    swz<T, 4, 1, 2, 3> yzw;
    swz<T, 4, 0, 1, 2, 3> xyzw;
    swz<T, 4, 3, 2, 1, 0> wzyx;
  };
  MSL_VEC_COMMON(4)
  MSL_FN vec(T p, T q, T s, T t) : d{p, q, s, t} {}
  MSL_FN vec(vec<T, 2> pq, vec<T, 2> st) : d{pq.d[0], pq.d[1], st.d[0], st.d[1]} {}
  MSL_FN vec(vec<T, 2> pq, T s, T t) : d{pq.d[0], pq.d[1], s, t} {}
  MSL_FN vec(T p, T q, vec<T, 2> st) : d{p, q, st.d[0], st.d[1]} {}
  MSL_FN vec(vec<T, 3> pqs, T t) : d{pqs.d[0], pqs.d[1], pqs.d[2], t} {}
  MSL_FN vec(T p, vec<T, 3> qst) : d{p, qst.d[0], qst.d[1], qst.d[2]} {}
};

// Operators

// The type both operands of an operator convert to; no type, hence no overload, where Metal has none
template <class A, class B, bool AIsVector = vtraits<A>::is, bool BIsVector = vtraits<B>::is>
struct binr {};
template <class A, class B>
struct binr<A, B, true, true>
    : eif<same_t<typename vtraits<A>::E, typename vtraits<B>::E>::v && vtraits<A>::n == vtraits<B>::n,
          vec<typename vtraits<A>::E, vtraits<A>::n>> {};
template <class A, class B>
struct binr<A, B, true, false>
    : eif<convertible<B, typename vtraits<A>::E>::v, vec<typename vtraits<A>::E, vtraits<A>::n>> {};
template <class A, class B>
struct binr<A, B, false, true> : binr<B, A, true, false> {};

template <class V>
struct boolv {
  using t = vec<bool, vtraits<V>::n>;
};

#define MSL_ARITHMETIC(OP)                                                                          \
  template <class A, class B, class R = typename binr<A, B>::type>                                  \
  MSL_FN R operator OP(const A& left, const B& right) {                                             \
    R a(left), b(right), result;                                                                    \
    for (int i = 0; i < vtraits<R>::n; i++) result.d[i] = typename vtraits<R>::E(a.d[i] OP b.d[i]); \
    return result;                                                                                  \
  }                                                                                                 \
  template <class T, int N, class B, class R = typename binr<vec<T, N>, B>::type>                   \
  MSL_FN vec<T, N>& operator OP##=(vec<T, N>& a, const B & b) {                                     \
    return a = a OP b;                                                                              \
  }
MSL_ARITHMETIC(+)
MSL_ARITHMETIC(-)
MSL_ARITHMETIC(*)
MSL_ARITHMETIC(/)
MSL_ARITHMETIC(%)
MSL_ARITHMETIC(&)
MSL_ARITHMETIC(|)
MSL_ARITHMETIC(^)
MSL_ARITHMETIC(<<)
MSL_ARITHMETIC(>>)

#define MSL_COMPARISON(OP)                                                  \
  template <class A, class B, class R = typename binr<A, B>::type>          \
  MSL_FN typename boolv<R>::t operator OP(const A& left, const B& right) {  \
    R a(left), b(right);                                                    \
    typename boolv<R>::t result;                                            \
    for (int i = 0; i < vtraits<R>::n; i++) result.d[i] = a.d[i] OP b.d[i]; \
    return result;                                                          \
  }
MSL_COMPARISON(<)
MSL_COMPARISON(>)
MSL_COMPARISON(<=)
MSL_COMPARISON(>=)
MSL_COMPARISON(==)
MSL_COMPARISON(!=)

template <class T, int N>
MSL_FN vec<T, N> operator-(const vec<T, N>& a) {
  vec<T, N> result;
  for (int i = 0; i < N; i++) result.d[i] = T(-a.d[i]);
  return result;
}
template <class T, int N>
MSL_FN vec<T, N> operator~(const vec<T, N>& a) {
  vec<T, N> result;
  for (int i = 0; i < N; i++) result.d[i] = T(~a.d[i]);
  return result;
}
template <int N>
MSL_FN vec<bool, N> operator!(const vec<bool, N>& a) {
  vec<bool, N> result;
  for (int i = 0; i < N; i++) result.d[i] = !a.d[i];
  return result;
}

// Functions of vectors alone

template <int N>
MSL_FN bool any(const vec<bool, N>& a) {
  bool result = false;
  for (int i = 0; i < N; i++) result = result || a.d[i];
  return result;
}
template <int N>
MSL_FN bool all(const vec<bool, N>& a) {
  bool result = true;
  for (int i = 0; i < N; i++) result = result && a.d[i];
  return result;
}
template <class A, class B, class R = typename binr<A, B>::type>
MSL_FN typename vtraits<R>::E dot(const A& left, const B& right) {
  R a(left), b(right);
  typename vtraits<R>::E result = a.d[0] * b.d[0];
  for (int i = 1; i < vtraits<R>::n; i++) result = result + a.d[i] * b.d[i];
  return result;
}
template <class T, int N>
MSL_FN vec<T, N> select(const vec<T, N>& a, const vec<T, N>& b, const vec<bool, N>& condition) {
  vec<T, N> result;
  for (int i = 0; i < N; i++) result.d[i] = condition.d[i] ? b.d[i] : a.d[i];
  return result;
}

// Vectors aligned like their element

template <class T>
struct packed3 {
  T x, y, z;
  MSL_FN operator vec<T, 3>() const { return vec<T, 3>(x, y, z); }
  MSL_FN void operator=(const vec<T, 3>& v) { x = v.x, y = v.y, z = v.z; }
};
template <class T>
struct packed4 {
  T x, y, z, w;
  MSL_FN operator vec<T, 4>() const { return vec<T, 4>(x, y, z, w); }
  MSL_FN void operator=(const vec<T, 4>& v) { x = v.x, y = v.y, z = v.z, w = v.w; }
};

}  // namespace metal
