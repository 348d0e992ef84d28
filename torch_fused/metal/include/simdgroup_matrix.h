// Metal's matrices of 8 x 8 elements that a simdgroup holds together, two elements of a row in each lane.
#pragma once

namespace metal {

template <class T, int C = 8, int R = 8>
struct simdgroup_matrix {
  static_assert(C == 8 && R == 8, "simdgroup_matrix: 8 columns and 8 rows");
  static_assert(is_floating_point_v<T>, "simdgroup_matrix: of float, half or bfloat");
  vec<T, 2> own;

  simdgroup_matrix() = default;
  MSL_FN explicit simdgroup_matrix(T diagonal, MSL_HERE);
  MSL_FN vec<T, 2>& thread_elements() { return own; }
  MSL_FN const vec<T, 2>& thread_elements() const { return own; }
};
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;

// Where the first of a lane's two elements is
struct msl_matrix_place {
  uint row, column;
  MSL_FN explicit msl_matrix_place(uint lane)
      : row((lane >> 2 & 4) + (lane >> 1 & 3)), column((lane >> 1 & 4) + (lane & 1) * 2) {}
};
MSL_FN uint msl_matrix_lane(uint row, uint column) {
  return row >> 2 << 4 | column >> 2 << 3 | (row & 3) << 1 | (column >> 1 & 1);
}
MSL_FN msl_matrix_place msl_place(int operation, int line, const char* file) {
  return msl_matrix_place(exchange<uint>(0, operation, line, file).lane);
}

template <class T, int C, int R>
MSL_FN simdgroup_matrix<T, C, R>::simdgroup_matrix(T diagonal, int line_, const char* file_) {
  const msl_matrix_place place = msl_place(40, line_, file_);
  for (uint i = 0; i < 2; i++) own[i] = place.row == place.column + i ? diagonal : T(0.0f);
}
template <class T, int C = 8, int R = 8>
MSL_FN simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, C, R> m;
  m.own = vec<T, 2>(value);
  return m;
}

template <class T, class U>
MSL_FN void simdgroup_load(simdgroup_matrix<T>& m, const U* from, ulong elements_per_row = 8,
                           vec<ulong, 2> origin = vec<ulong, 2>(0), bool transposed = false, MSL_HERE) {
  static_assert(same_t<remove_cv_t<U>, T>::v, "simdgroup_load: from elements of the matrix's type");
  const msl_matrix_place place = msl_place(41, line_, file_);
  for (uint i = 0; i < 2; i++) {
    const ulong row = transposed ? place.column + i : place.row, column = transposed ? place.row : place.column + i;
    m.own[i] = from[(origin.y + row) * elements_per_row + origin.x + column];
  }
}
template <class T, class U>
MSL_FN void simdgroup_store(const simdgroup_matrix<T>& m, U* to, ulong elements_per_row = 8,
                            vec<ulong, 2> origin = vec<ulong, 2>(0), bool transposed = false, MSL_HERE) {
  static_assert(same_t<remove_cv_t<U>, T>::v, "simdgroup_store: to elements of the matrix's type");
  const msl_matrix_place place = msl_place(42, line_, file_);
  for (uint i = 0; i < 2; i++) {
    const ulong row = transposed ? place.column + i : place.row, column = transposed ? place.row : place.column + i;
    to[(origin.y + row) * elements_per_row + origin.x + column] = m.own[i];
  }
}

// The products of a row and a column are added to `start` in order, in float.
struct msl_matrix_elements {
  float a[2], b[2];
};
MSL_UNCHECKED inline float msl_matrix_sum(const lanes<msl_matrix_elements>& all, uint row, uint column, float start) {
  for (uint k = 0; k < 8; k++) {
    start = start + all[msl_matrix_lane(row, k)].a[k & 1] * all[msl_matrix_lane(k, column)].b[column & 1];
  }
  return start;
}
template <class D, class A, class B, class E>
MSL_FN void simdgroup_multiply_accumulate(simdgroup_matrix<D>& d, const simdgroup_matrix<A>& a,
                                          const simdgroup_matrix<B>& b, const simdgroup_matrix<E>& c, MSL_HERE) {
  const msl_matrix_elements own = {{float(a.own[0]), float(a.own[1])}, {float(b.own[0]), float(b.own[1])}};
  const lanes<msl_matrix_elements> all = exchange(own, 43, line_, file_);
  if (all.mask != 0xffffffff) msl_rt.fail("simdgroup_matrix operation without all 32 threads", line_, file_);
  const msl_matrix_place place(all.lane);
  for (uint i = 0; i < 2; i++) d.own[i] = D(msl_matrix_sum(all, place.row, place.column + i, float(c.own[i])));
}
template <class D, class A, class B>
MSL_FN void simdgroup_multiply(simdgroup_matrix<D>& d, const simdgroup_matrix<A>& a, const simdgroup_matrix<B>& b,
                               MSL_HERE) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D>(D(0.0f)), line_, file_);
}
template <class T>
MSL_FN simdgroup_matrix<T> operator*(const simdgroup_matrix<T>& a, const simdgroup_matrix<T>& b) {
  simdgroup_matrix<T> result;
  simdgroup_multiply(result, a, b, 0, "an operator * of two simdgroup matrices");
  return result;
}

}  // namespace metal
