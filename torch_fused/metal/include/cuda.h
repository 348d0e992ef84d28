// Metal's standard library for CUDA, compiled by NVRTC: a warp is a simdgroup, a block is a threadgroup, __shared__
// memory threadgroup memory. Grids are whole blocks along x, so a builtin of the grid is a product of block and grid
// sizes. Blocks are whole warps, as cuda.cpp checks: the mask of a warp's function must be a constant to cost nothing.
#pragma once

#define MSL_TG_VAR(ID, LINE, NAME, TYPE, ...) __shared__ TYPE NAME __VA_ARGS__

namespace msl_cuda {

constexpr unsigned ALL_LANES = 0xffffffffu;

MSL_FN unsigned lane_index() {
  return threadIdx.x & 31;
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
  for (unsigned distance = 16; distance > 0; distance /= 2) {
    value = function(value,
                     shuffle_words(value, [=](unsigned word) { return __shfl_xor_sync(ALL_LANES, word, distance); }));
  }
  return value;
}

}  // namespace msl_cuda

namespace metal {

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

// Barriers

MSL_FN void threadgroup_barrier(mem_flags) {
  __syncthreads();
}
MSL_FN void simdgroup_barrier(mem_flags) {
  __syncwarp();
}

// For a kernel that was launched before those ahead of it were done: they are now. The one behind it may begin as well.
MSL_FN void previous_launch_done(uint) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Simdgroup functions

#define MSL_SHUFFLE(NAME, INTRINSIC)                                                                              \
  template <class T>                                                                                              \
  MSL_FN T NAME(T value, ushort lane) {                                                                           \
    return msl_cuda::shuffle_words(value, [=](uint word) { return INTRINSIC(msl_cuda::ALL_LANES, word, lane); }); \
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
#if __CUDA_ARCH__ >= 800
MSL_FN uint simd_sum(uint value) {
  return __reduce_add_sync(msl_cuda::ALL_LANES, value);
}
MSL_FN uint simd_max(uint value) {
  return __reduce_max_sync(msl_cuda::ALL_LANES, value);
}
MSL_FN uint simd_min(uint value) {
  return __reduce_min_sync(msl_cuda::ALL_LANES, value);
}
#endif

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

MSL_FN simd_vote simd_ballot(bool condition) {
  return simd_vote(__ballot_sync(msl_cuda::ALL_LANES, condition));
}
MSL_FN bool simd_any(bool condition) {
  return __any_sync(msl_cuda::ALL_LANES, condition);
}
MSL_FN bool simd_all(bool condition) {
  return __all_sync(msl_cuda::ALL_LANES, condition);
}

// Matrix units: functions of csrc_mps/decode/tile.metal.h for mma.m16n8k8, in place of Metal's matrices. The units take
// floats of 19 bits. A weight of 16 bits is one; a value is passed as two, so that 22 of its 24 bits count, and an
// infinite one gives NaN.

template <class T, int C, int R>
struct simdgroup_matrix;

template <class Place>
MSL_FN void tile_lane(uint lane, Place& at) {
  at.row = lane / 4, at.pair = lane % 4, at.result = lane % 4 * 2;
  for (uint i = 0; i < 2; i++) at.vectors[i] = lane / 4, at.vector_pairs[i] = lane % 4, at.vector_halves[i] = i;
}

MSL_FN void multiply_tile(float* sums, const float* w, const float* x) {
#if __CUDA_ARCH__ >= 800
  const uint a[4] = {as_type<uint>(w[0]), as_type<uint>(w[2]), as_type<uint>(w[1]), as_type<uint>(w[3])};
  uint b[2][2];  // the first bits of x, and the rest
  for (int i = 0; i < 2; i++) {
    b[0][i] = as_type<uint>(x[i]) & 0xffffe000u;
    b[1][i] = as_type<uint>(x[i] - as_type<float>(b[0][i]));
  }
  for (int i = 0; i < 2; i++) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[i][0]), "r"(b[i][1]));
  }
#else
  const uint lane = msl_cuda::lane_index();
  for (uint pair = 0; pair < 4; pair++) {
    for (uint i = 0; i < 4; i++) {
      const uint row_lane = lane / 4 * 4 + pair, vector_lane = (lane % 4 * 2 + i % 2) * 4 + pair;
      for (uint k = 0; k < 2; k++) {
        const float weight = i < 2 ? simd_shuffle(w[k], row_lane) : simd_shuffle(w[2 + k], row_lane);
        sums[i] = fma(weight, simd_shuffle(x[k], vector_lane), sums[i]);
      }
    }
  }
#endif
}

MSL_FN void sum_of_runs(float* parts, uint lane) {
  float sum = parts[0] + parts[1];
  sum += simd_shuffle_xor(sum, 1);
  sum += simd_shuffle_xor(sum, 2);
  for (uint i = 0; i < 2; i++) parts[i] = simd_shuffle(sum, (lane % 4 * 2 + i) * 4);
}

// Loads of csrc_mps/decode/vectors.metal.h for data that is read once: the first of a line's sectors brings the whole
// line to the second level of the cache, and nothing stays in the first.

MSL_FN uint4 read_once(const uint4* from) {
  uint4 words;
  asm("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
      : "l"(from));
  return words;
}
MSL_FN uint2 read_once(const uint2* from) {
  uint2 words;
  asm("ld.global.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "l"(from));
  return words;
}

// Functions of csrc_mps/quantized/packed_tile.metal.h for mma.m16n8k16 with bfloat: a value is three of them, each of
// which is what the ones before leave. They are three of the four columns of a half, and the fourth is zero.

constexpr uint STAGED_STRIDE = 256 + 4;

MSL_FN void stage_word(uint4* staged, uint place, const float* x) {
  float rest[8];
  for (int k = 0; k < 8; k++) rest[k] = x[k];
  for (int part = 0; part < 3; part++) {
    uint pairs[4];
    for (int j = 0; j < 4; j++) {
      pairs[j] = __byte_perm(as_type<uint>(rest[j]), as_type<uint>(rest[j + 4]), 0x7632);
      rest[j] -= as_type<float>(as_type<uint>(rest[j]) & 0xffff0000u);
      rest[j + 4] -= as_type<float>(as_type<uint>(rest[j + 4]) & 0xffff0000u);
    }
    staged[part * STAGED_STRIDE + place] = uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
  staged[3 * STAGED_STRIDE + place] = uint4(0u);
}

template <int WORDS, class Lanes>
MSL_FN void multiply_word(float* sums, const uint* words, const uint4* staged, uint first, int i, Lanes, uint one) {
  const uint column = msl_cuda::lane_index() / 4, pair = msl_cuda::lane_index() % 4;
  const uint row = column / 4 == pair / 2 ? column % 4 : 3;
  const uint4 b = staged[row * STAGED_STRIDE + first + 4 * i + pair];
  const uint columns[4] = {b.x, b.y, b.z, b.w}, ones = one | one >> 16;  // of two bfloats
  for (int j = 0; j < 4; j += 2) {
    uint a[2][2];
    for (int k = 0; k < 2; k++) {
      for (int r = 0; r < 2; r++) {
        const uint moved = j + k == 0 ? words[r] << 3 : words[r] >> (4 * (j + k) - 3);
        a[k][r] = (moved & 0x00780078u) | ones;
      }
    }
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0][0]), "r"(a[0][1]), "r"(a[1][0]), "r"(a[1][1]), "r"(columns[j]), "r"(columns[j + 1]));
  }
}

MSL_FN void sum_columns(float* rows, uint) {
  for (int i = 0; i < 2; i++) {
    rows[i] += simd_shuffle_xor(rows[i], 1);
    rows[i] += simd_shuffle_xor(rows[i], 2);
  }
}

// Atomics: 32-bit integers

#define MSL_ATOMIC(NAME, INTRINSIC)                                                   \
  template <class T>                                                                  \
  MSL_FN T NAME(atomic<T>* object, typename same_as<T>::type operand, memory_order) { \
    return ::INTRINSIC(&object->value, operand);                                      \
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
MSL_FN void atomic_store_explicit(atomic<T>* object, typename same_as<T>::type value, memory_order) {
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
    case 2:
      return thread;  // thread_position_in_threadgroup, thread_index_in_threadgroup
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
      return threadIdx.x / 32;  // simdgroup_index_in_threadgroup
    case 10:                    // simdgroups_per_threadgroup
    case 11:
      return blockDim.x / 32;  // dispatch_simdgroups_per_threadgroup
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
