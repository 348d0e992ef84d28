// Metal's geometric functions, of vectors of floats, and matrices. Each operation rounds to the element's type.
#pragma once

namespace metal {

template <class A, class V = vector_of<A>>
MSL_FN auto length_squared(const A& x) {
  return dot(x, x);
}
template <class A, class V = vector_of<A>>
MSL_FN auto length(const A& x) {
  return sqrt(dot(x, x));
}
template <class A, class B, class V = vector_of<A, B>>
MSL_FN auto distance_squared(const A& x, const B& y) {
  return length_squared(V(x) - V(y));
}
template <class A, class B, class V = vector_of<A, B>>
MSL_FN auto distance(const A& x, const B& y) {
  return length(V(x) - V(y));
}
template <class A, class V = vector_of<A>>
MSL_FN V normalize(const A& x) {
  return V(x) * rsqrt(length_squared(x));
}
template <class A, class B, class V = vector_of<A, B>>
MSL_FN V cross(const A& x, const B& y) {
  static_assert(vtraits<V>::n == 3, "cross: vectors of three elements");
  using E = typename vtraits<V>::E;
  const V a(x), b(y);
  return V(E(a[1] * b[2] - a[2] * b[1]), E(a[2] * b[0] - a[0] * b[2]), E(a[0] * b[1] - a[1] * b[0]));
}
template <class A, class B, class V = vector_of<A, B>>
MSL_FN V reflect(const A& incident, const B& normal) {
  using E = typename vtraits<V>::E;
  return V(incident) - V(normal) * E(E(2.0f) * dot(normal, incident));
}
template <class A, class B, class V = vector_of<A, B>>
MSL_FN V refract(const A& incident, const B& normal, typename vtraits<V>::E ratio) {
  using E = typename vtraits<V>::E;
  const E cosine = dot(normal, incident);
  const E k = E(1.0f) - ratio * ratio * (E(1.0f) - cosine * cosine);
  return k < E(0.0f) ? V(E(0.0f)) : V(incident) * ratio - V(normal) * E(ratio * cosine + sqrt(k));
}
template <class A, class B, class C, class V = vector_of<A, B, C>>
MSL_FN V faceforward(const A& normal, const B& incident, const C& reference) {
  return dot(incident, reference) < typename vtraits<V>::E(0.0f) ? V(normal) : -V(normal);
}

// C columns of R rows
template <class T, int C, int R>
struct matrix {
  using column = vec<T, R>;
  column columns[C];

  matrix() = default;
  MSL_FN explicit matrix(T diagonal) {
    for (int c = 0; c < C; c++) {
      for (int r = 0; r < R; r++) columns[c][r] = c == r ? diagonal : T(0.0f);
    }
  }
  template <class U>
  MSL_FN explicit matrix(const matrix<U, C, R>& m) {
    for (int c = 0; c < C; c++) columns[c] = column(m.columns[c]);
  }
  template <class A, class B, class... More,
            class = typename eif<((vtraits<A>::n + vtraits<B>::n) + ... + vtraits<More>::n) == C * R>::type>
  MSL_FN matrix(const A& a, const B& b, const More&... more) {
    T elements[C * R];
    T* next = elements;
    msl_append(next, a), msl_append(next, b), (msl_append(next, more), ...);
    for (int i = 0; i < C * R; i++) columns[i / R][i % R] = elements[i];
  }
  MSL_FN column& operator[](int c) { return columns[c]; }
  MSL_FN const column& operator[](int c) const { return columns[c]; }
};
#define MSL_MATRICES(T)           \
  using T##2x2 = matrix<T, 2, 2>; \
  using T##2x3 = matrix<T, 2, 3>; \
  using T##2x4 = matrix<T, 2, 4>; \
  using T##3x2 = matrix<T, 3, 2>; \
  using T##3x3 = matrix<T, 3, 3>; \
  using T##3x4 = matrix<T, 3, 4>; \
  using T##4x2 = matrix<T, 4, 2>; \
  using T##4x3 = matrix<T, 4, 3>; \
  using T##4x4 = matrix<T, 4, 4>;
MSL_MATRICES(float)
MSL_MATRICES(half)
MSL_MATRICES(bfloat)

#define MSL_MATRIX_SUM(OP)                                                                 \
  template <class T, int C, int R>                                                         \
  MSL_FN matrix<T, C, R> operator OP(const matrix<T, C, R>& a, const matrix<T, C, R>& b) { \
    matrix<T, C, R> result;                                                                \
    for (int c = 0; c < C; c++) result[c] = a[c] OP b[c];                                  \
    return result;                                                                         \
  }                                                                                        \
  template <class T, int C, int R>                                                         \
  MSL_FN matrix<T, C, R>& operator OP##=(matrix<T, C, R>& a, const matrix<T, C, R>& b) {   \
    return a = a OP b;                                                                     \
  }
MSL_MATRIX_SUM(+)
MSL_MATRIX_SUM(-)
template <class T, int C, int R>
MSL_FN matrix<T, C, R> operator-(const matrix<T, C, R>& a) {
  matrix<T, C, R> result;
  for (int c = 0; c < C; c++) result[c] = -a[c];
  return result;
}
template <class T, int C, int R>
MSL_FN matrix<T, C, R> operator*(const matrix<T, C, R>& a, typename same_as<T>::type s) {
  matrix<T, C, R> result;
  for (int c = 0; c < C; c++) result[c] = a[c] * s;
  return result;
}
template <class T, int C, int R>
MSL_FN matrix<T, C, R> operator*(typename same_as<T>::type s, const matrix<T, C, R>& a) {
  return a * s;
}
template <class T, int C, int R>
MSL_FN matrix<T, C, R>& operator*=(matrix<T, C, R>& a, typename same_as<T>::type s) {
  return a = a * s;
}
template <class T, int C, int R>
MSL_FN vec<T, R> operator*(const matrix<T, C, R>& a, typename same_as<vec<T, C>>::type x) {
  vec<T, R> result = a[0] * x[0];
  for (int c = 1; c < C; c++) result += a[c] * x[c];
  return result;
}
template <class T, int C, int R>
MSL_FN vec<T, C> operator*(typename same_as<vec<T, R>>::type x, const matrix<T, C, R>& a) {
  vec<T, C> result;
  for (int c = 0; c < C; c++) result[c] = dot(x, a[c]);
  return result;
}
template <class T, int N, int C, int R>
MSL_FN matrix<T, C, R> operator*(const matrix<T, N, R>& a, const matrix<T, C, N>& b) {
  matrix<T, C, R> result;
  for (int c = 0; c < C; c++) result[c] = a * b[c];
  return result;
}
template <class T, int C, int R>
MSL_FN matrix<T, C, R>& operator*=(matrix<T, C, R>& a, const matrix<T, C, C>& b) {
  return a = a * b;
}
template <class T, int C, int R>
MSL_FN bool operator==(const matrix<T, C, R>& a, const matrix<T, C, R>& b) {
  bool equal = true;
  for (int c = 0; c < C; c++) equal = equal && all(a[c] == b[c]);
  return equal;
}
template <class T, int C, int R>
MSL_FN bool operator!=(const matrix<T, C, R>& a, const matrix<T, C, R>& b) {
  return !(a == b);
}
template <class T, int C, int R>
MSL_FN matrix<T, R, C> transpose(const matrix<T, C, R>& a) {
  matrix<T, R, C> result;
  for (int i = 0; i < C * R; i++) result[i % R][i / R] = a[i / R][i % R];
  return result;
}
template <class T, int N>
MSL_FN T determinant(const matrix<T, N, N>& a) {
  if constexpr (N == 1) {
    return a[0][0];
  } else if constexpr (N == 2) {
    return a[0][0] * a[1][1] - a[1][0] * a[0][1];
  } else if constexpr (N == 3) {
    return dot(a[0], cross(a[1], a[2]));
  } else {
    T result = T(0.0f);
    for (int c = 0; c < N; c++) {
      matrix<T, N - 1, N - 1> minor;
      for (int i = 0; i < (N - 1) * (N - 1); i++) {
        const int column = i / (N - 1);
        minor[column][i % (N - 1)] = a[column < c ? column : column + 1][1 + i % (N - 1)];
      }
      const T term = a[c][0] * determinant(minor);
      result = c % 2 ? result - term : result + term;
    }
    return result;
  }
}

}  // namespace metal
