// Metal's vector types for compilers that have none: shared by the emulator's metal_stdlib and by cuda.h.
// Operands of one operator have the same element type and width, or one of them is a scalar, as in Metal.
// The front end lists the swizzles that a source uses, as MSL_SWIZZLES_2 to MSL_SWIZZLES_4.
#pragma once

#ifdef __CUDACC__
#define MSL_FN __device__ __forceinline__
#define MSL_ANY __device__
#else
#define MSL_FN inline __attribute__((always_inline))
#define MSL_ANY
#endif
#ifndef MSL_SWIZZLES_2
#define MSL_SWIZZLES_2
#define MSL_SWIZZLES_3
#define MSL_SWIZZLES_4
#endif

namespace metal {

template <class T, int N>
struct vec;
template <class T, int Size, int... I>
struct swz;
template <class T, int N>
struct packed;

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

template <class T>
struct is_integer {
  static constexpr bool v = false;
};
#define MSL_INTEGER_TYPE(T)         \
  template <>                       \
  struct is_integer<T> {            \
    static constexpr bool v = true; \
  };
MSL_INTEGER_TYPE(bool)
MSL_INTEGER_TYPE(char)
MSL_INTEGER_TYPE(signed char)
MSL_INTEGER_TYPE(unsigned char)
MSL_INTEGER_TYPE(short)
MSL_INTEGER_TYPE(unsigned short)
MSL_INTEGER_TYPE(int)
MSL_INTEGER_TYPE(unsigned)
MSL_INTEGER_TYPE(long)
MSL_INTEGER_TYPE(unsigned long)

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
template <class T, int N>
struct vtraits<packed<T, N>> : vtraits<vec<T, N>> {};
template <class T>
struct vtraits<const T> : vtraits<T> {};

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
  MSL_FN typename vtraits<value>::E operator[](int i) const { return value(*this)[i]; }
#define MSL_SWIZZLE_UPDATE(OP)             \
  template <class B>                       \
  MSL_FN void operator OP##=(const B& b) { \
    *this = value(*this) OP b;             \
  }
  MSL_SWIZZLE_UPDATE(+)
  MSL_SWIZZLE_UPDATE(-)
  MSL_SWIZZLE_UPDATE(*)
  MSL_SWIZZLE_UPDATE(/)
  MSL_SWIZZLE_UPDATE(%)
  MSL_SWIZZLE_UPDATE(&)
  MSL_SWIZZLE_UPDATE(|)
  MSL_SWIZZLE_UPDATE(^)
  MSL_SWIZZLE_UPDATE(<<)
  MSL_SWIZZLE_UPDATE(>>)
};

// A vector's storage: three elements are aligned like four, and an assignment copies it in one piece
template <class T, int N>
struct alignas((N == 3 ? 4 : N) * sizeof(T)) elements {
  T d[N];
};

// Writes the elements of a scalar or vector from d on
template <class T, class A>
MSL_FN constexpr void msl_append(T*& d, const A& a) {
  if constexpr (vtraits<A>::is) {
    const vec<typename vtraits<A>::E, vtraits<A>::n> v(a);
    for (int i = 0; i < vtraits<A>::n; i++) *d++ = T(v.d[i]);
  } else {
    *d++ = T(a);
  }
}

// Constructors, assignment and subscripts of every width. A scalar converts implicitly, another vector does not.
#define MSL_VEC_COMMON(N, ...)                                                                                 \
  vec() = default;                                                                                             \
  vec(const vec&) = default;                                                                                   \
  MSL_FN vec& operator=(const vec& v) {                                                                        \
    whole = v.whole;                                                                                           \
    return *this;                                                                                              \
  }                                                                                                            \
  MSL_FN constexpr vec(T s) : d{__VA_ARGS__} {}                                                                \
  template <class U, class = typename eif<!vtraits<U>::is && !same_t<U, T>::v && convertible<U, T>::v>::type>  \
  MSL_FN constexpr vec(U s) : vec(T(s)) {}                                                                     \
  template <class U, class = typename eif<!vtraits<U>::is && !same_t<U, T>::v && !convertible<U, T>::v>::type, \
            class = void>                                                                                      \
  MSL_FN constexpr explicit vec(U s) : vec(T(s)) {}                                                            \
  template <class U, class = typename eif<!same_t<U, T>::v>::type>                                             \
  MSL_FN explicit vec(vec<U, N> v) {                                                                           \
    for (int i = 0; i < N; i++) d[i] = T(v.d[i]);                                                              \
  }                                                                                                            \
  template <class U, int Size, int... I, class = typename eif<!same_t<U, T>::v && sizeof...(I) == N>::type>    \
  MSL_FN explicit vec(const swz<U, Size, I...>& v) : vec(vec<U, N>(v)) {}                                      \
  template <class U, class = typename eif<!same_t<U, T>::v>::type>                                             \
  MSL_FN explicit vec(const packed<U, N>& v) : vec(vec<U, N>(v)) {}                                            \
  template <class A, class B, class... More,                                                                   \
            class = typename eif<((vtraits<A>::n + vtraits<B>::n) + ... + vtraits<More>::n) == N>::type>       \
  MSL_FN constexpr vec(const A& a, const B& b, const More&... more) : d{} {                                    \
    T* next = d;                                                                                               \
    msl_append(next, a), msl_append(next, b), (msl_append(next, more), ...);                                   \
  }                                                                                                            \
  MSL_FN T& operator[](int i) {                                                                                \
    return d[i];                                                                                               \
  }                                                                                                            \
  MSL_FN const T& operator[](int i) const {                                                                    \
    return d[i];                                                                                               \
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
    MSL_SWIZZLES_2
  };
  MSL_VEC_COMMON(2, s, s)
  MSL_FN constexpr vec(T a, T b) : d{a, b} {}
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
    MSL_SWIZZLES_3
  };
  MSL_VEC_COMMON(3, s, s, s)
  MSL_FN constexpr vec(T a, T b, T c) : d{a, b, c} {}
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
    MSL_SWIZZLES_4
  };
  MSL_VEC_COMMON(4, s, s, s, s)
  MSL_FN constexpr vec(T p, T q, T s, T t) : d{p, q, s, t} {}
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
    : eif<convertible<B, typename vtraits<A>::E>::v && (is_integer<B>::v || !is_integer<typename vtraits<A>::E>::v),
          vec<typename vtraits<A>::E, vtraits<A>::n>> {};
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

// The count of a shift is taken modulo the element's bits
#define MSL_SHIFT(OP)                                                                                 \
  template <class A, class B, class R = typename binr<A, B>::type>                                    \
  MSL_FN R operator OP(const A& left, const B& right) {                                               \
    using E = typename vtraits<R>::E;                                                                 \
    R a(left), b(right), result;                                                                      \
    for (int i = 0; i < vtraits<R>::n; i++) result.d[i] = E(a.d[i] OP(b.d[i] & (8 * sizeof(E) - 1))); \
    return result;                                                                                    \
  }                                                                                                   \
  template <class T, int N, class B, class R = typename binr<vec<T, N>, B>::type>                     \
  MSL_FN vec<T, N>& operator OP##=(vec<T, N>& a, const B & b) {                                       \
    return a = a OP b;                                                                                \
  }
MSL_SHIFT(<<)
MSL_SHIFT(>>)

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
template <class T, int N>
MSL_FN vec<T, N> operator+(const vec<T, N>& a) {
  return a;
}
template <class T, int N>
MSL_FN vec<bool, N> operator!(const vec<T, N>& a) {
  vec<bool, N> result;
  for (int i = 0; i < N; i++) result.d[i] = !a.d[i];
  return result;
}
#define MSL_LOGICAL(OP)                                                           \
  template <int N>                                                                \
  MSL_FN vec<bool, N> operator OP(const vec<bool, N>& a, const vec<bool, N>& b) { \
    vec<bool, N> result;                                                          \
    for (int i = 0; i < N; i++) result.d[i] = a.d[i] OP b.d[i];                   \
    return result;                                                                \
  }
MSL_LOGICAL(&&)
MSL_LOGICAL(||)
#define MSL_STEP(OP)                                    \
  template <class T, int N>                             \
  MSL_FN vec<T, N>& operator OP##OP(vec<T, N>& a) {     \
    return a = a OP T(1);                               \
  }                                                     \
  template <class T, int N>                             \
  MSL_FN vec<T, N> operator OP##OP(vec<T, N>& a, int) { \
    const vec<T, N> old = a;                            \
    a = a OP T(1);                                      \
    return old;                                         \
  }
MSL_STEP(+)
MSL_STEP(-)

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
MSL_FN bool any(bool a) {
  return a;
}
MSL_FN bool all(bool a) {
  return a;
}
template <class A, class B, class R = typename binr<A, B>::type>
MSL_FN typename vtraits<R>::E dot(const A& left, const B& right) {
  R a(left), b(right);
  typename vtraits<R>::E result = a.d[0] * b.d[0];
  for (int i = 1; i < vtraits<R>::n; i++) result = result + a.d[i] * b.d[i];
  return result;
}
// Vectors aligned like their element. They convert to vectors, which compute.

#define MSL_PACKED(N, ...)                                                                              \
  template <class T>                                                                                    \
  struct packed<T, N> {                                                                                 \
    union {                                                                                             \
      T d[N];                                                                                           \
      struct {                                                                                          \
        T __VA_ARGS__;                                                                                  \
      };                                                                                                \
      struct {                                                                                          \
        T d[N];                                                                                         \
      } whole;                                                                                          \
      MSL_SWIZZLES_##N                                                                                  \
    };                                                                                                  \
    packed() = default;                                                                                 \
    packed(const packed&) = default;                                                                    \
    MSL_FN packed& operator=(const packed& p) {                                                         \
      whole = p.whole;                                                                                  \
      return *this;                                                                                     \
    }                                                                                                   \
    MSL_FN packed(const vec<T, N>& v) {                                                                 \
      for (int i = 0; i < N; i++) d[i] = v.d[i];                                                        \
    }                                                                                                   \
    template <class... A, class = typename eif<(sizeof...(A) > 1) && (vtraits<A>::n + ...) == N>::type> \
    MSL_FN packed(const A&... a) : packed(vec<T, N>(a...)) {}                                           \
    template <class A, class = typename eif<!vtraits<A>::is && convertible<A, T>::v>::type>             \
    MSL_FN packed(A a) : packed(vec<T, N>(a)) {}                                                        \
    MSL_FN operator vec<T, N>() const {                                                                 \
      vec<T, N> v;                                                                                      \
      for (int i = 0; i < N; i++) v.d[i] = d[i];                                                        \
      return v;                                                                                         \
    }                                                                                                   \
    MSL_FN T& operator[](int i) {                                                                       \
      return d[i];                                                                                      \
    }                                                                                                   \
    MSL_FN const T& operator[](int i) const {                                                           \
      return d[i];                                                                                      \
    }                                                                                                   \
    template <class B>                                                                                  \
    MSL_FN packed& operator+=(const B& b) {                                                             \
      return *this = vec<T, N>(*this) + b;                                                              \
    }                                                                                                   \
    template <class B>                                                                                  \
    MSL_FN packed& operator-=(const B& b) {                                                             \
      return *this = vec<T, N>(*this) - b;                                                              \
    }                                                                                                   \
    template <class B>                                                                                  \
    MSL_FN packed& operator*=(const B& b) {                                                             \
      return *this = vec<T, N>(*this) * b;                                                              \
    }                                                                                                   \
    template <class B>                                                                                  \
    MSL_FN packed& operator/=(const B& b) {                                                             \
      return *this = vec<T, N>(*this) / b;                                                              \
    }                                                                                                   \
  };
MSL_PACKED(2, x, y)
MSL_PACKED(3, x, y, z)
MSL_PACKED(4, x, y, z, w)

}  // namespace metal
