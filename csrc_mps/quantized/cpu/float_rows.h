// Products of a packed row with vectors of floats: codes become floats, and each group's sum is scaled once.
#pragma once

#include "../../decode/step/lanes.h"
#include "packed.h"

namespace torch_fused::TORCH_FUSED_TARGET {

constexpr uint32_t kIndex[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// One register of floats: g++ takes larger vectors of converted integers apart in memory.
#if defined(TORCH_FUSED_AVX512)
constexpr int64_t kWide = 16;
#elif defined(TORCH_FUSED_AVX2)
constexpr int64_t kWide = 8;
#else
constexpr int64_t kWide = 4;
#endif
typedef float Wide __attribute__((vector_size(4 * kWide)));
typedef int32_t WideInts __attribute__((vector_size(4 * kWide)));
typedef uint8_t WideBytes __attribute__((vector_size(kWide)));

TORCH_FUSED_INLINE void load_bytes(const uint8_t* from, WideInts& to) {
#if defined(TORCH_FUSED_AVX512)
  to = (WideInts)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(TORCH_FUSED_AVX2)
  to = (WideInts)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  WideBytes bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
  to = __builtin_convertvector(bytes, WideInts);
#endif
}

TORCH_FUSED_INLINE void load_wide(const float* from, Wide& to) {
  std::memcpy(&to, from, sizeof(to));
}

// The codes of a block, as the vectors are laid out.
constexpr int kBlockWides = kCodeBlock / kWide;

template <int bits>
TORCH_FUSED_INLINE void load_codes(const uint8_t* from, Wide (&to)[kBlockWides]) {
  constexpr int kLoads = bits == 4 ? kBlockWides / 2 : kBlockWides;
#pragma GCC unroll 8
  for (int i = 0; i < kLoads; ++i) {
    WideInts bytes;
    load_bytes(from + i * kWide, bytes);
    if constexpr (bits == 4) {
      const WideInts low = bytes & 15, high = bytes >> 4;
      to[i] = __builtin_convertvector(low, Wide);
      to[kLoads + i] = __builtin_convertvector(high, Wide);
    } else {
      to[i] = __builtin_convertvector(bytes, Wide);
    }
  }
}

// Calls place(column, i) for each column of a block, i its place there.
template <class Place>
TORCH_FUSED_INLINE void arranged(int64_t bits, Place place) {
  constexpr int64_t half = kCodeBlock / 2;
  if (bits == 4) {
    for (int64_t i = 0; i < half; ++i) place(2 * i, i);
    for (int64_t i = 0; i < half; ++i) place(2 * i + 1, half + i);
  } else {
    for (int64_t i = 0; i < kCodeBlock; ++i) place(i, i);
  }
}

TORCH_FUSED_INLINE void arrange_floats(const PackedMatrix& m, const float* x, float* values, float* sums) {
  std::fill(sums, sums + m.sums, 0.0f);
  for (int64_t block = 0; block < m.blocks; ++block, x += kCodeBlock, values += kCodeBlock) {
    arranged(m.bits, [&](int64_t column, int64_t i) __attribute__((always_inline)) { values[i] = x[column]; });
    Lanes sum = {}, next;
    for (int64_t i = 0; i < kCodeBlock; i += kLanes) {
      load(values + i, next);
      sum += next;
    }
    sums[block * kCodeBlock / m.group_size] += sum_of(sum);
  }
}

// The first `count` scales or biases of a register, and zeros. `beyond`: the memory after them may be read.
template <class S>
TORCH_FUSED_INLINE void load_first(const S* from, int64_t count, bool beyond, Lanes& to) {
#if defined(TORCH_FUSED_AVX512)
  (void)beyond;  // what is masked is not read
  const auto there = static_cast<__mmask16>(count < kLanes ? (1 << count) - 1 : -1);
  if constexpr (std::is_same_v<S, float>) {
    to = _mm512_maskz_loadu_ps(there, from);
  } else {
    const __m256i halves = _mm256_maskz_loadu_epi16(there, from);
    to = std::is_same_v<S, c10::Half>
             ? _mm512_maskz_cvtph_ps(there, halves)
             : (Lanes)_mm512_maskz_slli_epi32(there, _mm512_maskz_cvtepu16_epi32(there, halves), 16);
  }
#else
  if (beyond || count >= kLanes) {
    load(from, to);
  } else {
    S first[kLanes] = {};
    std::copy(from, from + count, first);
    load(first, to);
  }
  LaneBits bits, index;
  std::memcpy(&index, kIndex, sizeof(index));
  std::memcpy(&bits, &to, sizeof(bits));
  bits &= (LaneBits)(index < static_cast<uint32_t>(count));
  std::memcpy(&to, &bits, sizeof(bits));
#endif
}

// Adds all lanes to those of a register.
template <class Vector>
TORCH_FUSED_INLINE void add_lanes(const Lanes& from, Vector& to) {
  Vector parts[sizeof(Lanes) / sizeof(Vector)];
  std::memcpy(parts, &from, sizeof(from));
  for (const Vector& part : parts) to += part;
}

constexpr int64_t kGroupsAtOnce = 64;

// Some groups of a row.
struct PackedGroups {
  const uint8_t* codes;
  int64_t first, count;
  float scales[kGroupsAtOnce], biases[kGroupsAtOnce];  // zero to the end of a register
};

// Prefetches a line some way ahead and moves on to the next. Rows that are read together are several streams, which
// hardware prefetchers lose track of; but the rows are adjacent, and their lines in the order of addresses are one.
template <int R>
TORCH_FUSED_INLINE void fetch_ahead(const uint8_t*& line) {
  constexpr int64_t kAhead = 8192, kLine = 64;
  if (R > 1) prefetch(line + kAhead, kLine);
  line += kLine;
}

constexpr int64_t kMostAtOnce = 64;   // vectors
typedef float Products[kMostAtOnce];  // of a row

// Adds the sums of lanes, and the biases' part of the products, to those of each row with vectors from `first` on.
template <class Vector, int R, int C>
TORCH_FUSED_INLINE void add_totals(const PackedMatrix& m, const PackedGroups (&rows)[R], const Vector (&totals)[R][C],
                                   const float* sums, int64_t first, Products* results) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      Lanes shift = {}, bias, sum;
      for (int64_t i = 0; i < rows[r].count; i += kLanes) {
        load(rows[r].biases + i, bias);
        load(sums + (first + c) * m.sums + rows[r].first + i, sum);
        shift += bias * sum;
      }
      Vector total = totals[r][c];
      add_lanes(shift, total);
      results[r][first + c] += sum_of(total);
    }
  }
}

// Adds the products of R rows with C vectors from `first` on: several rows with one vector, so that no sum waits for
// the one before it.
template <int bits, int group_size, int C, int R>
TORCH_FUSED_INLINE void add_products(const PackedMatrix& m, const PackedGroups (&rows)[R], const FloatVectors& x,
                                     int64_t first, Products* results) {
  constexpr int blocks = group_size / kCodeBlock;
  const float* values = x.values + first * m.cols + rows[0].first * group_size;
  constexpr int kBytes = kCodeBlock * bits / 8;  // of a block
  const uint8_t* line = rows[0].codes + (R - 1) * rows[0].first * blocks * kBytes;
  Wide totals[R][C] = {};
  for (int64_t group = 0; group < rows[0].count; ++group) {
    Wide dots[R][C] = {};
#pragma GCC unroll 8
    for (int block = 0; block < blocks; ++block) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        Wide codes[kBlockWides], value;
        const int64_t at = (group * blocks + block) * kBytes;
        const uint8_t* from = rows[r].codes + at;
        if (at % 64 == 0) fetch_ahead<R>(line);
        load_codes<bits>(from, codes);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
#pragma GCC unroll 8
          for (int i = 0; i < kBlockWides; ++i) {
            load_wide(values + c * m.cols + i * kWide, value);
            dots[r][c] += codes[i] * value;
          }
        }
      }
      values += kCodeBlock;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) totals[r][c] += rows[r].scales[group] * dots[r][c];
    }
  }
  add_totals(m, rows, totals, x.sums, first, results);
}

// A product weight by weight. A sum above may be no number where infinities or overflows cancel; this one has the
// unpacked matrix's.
inline void add_exact_product(const PackedMatrix& m, const PackedGroups& groups, const FloatVectors& x, int64_t vector,
                              float& result) {
  const int64_t in_group = m.group_size / kCodeBlock;
  const float* values = x.values + vector * m.cols + groups.first * m.group_size;
  const uint8_t* from = groups.codes;
  for (int64_t block = 0; block < groups.count * in_group; ++block) {
    const float scale = groups.scales[block / in_group], bias = groups.biases[block / in_group];
    arranged(m.bits, [&](int64_t column, int64_t i) {
      const int code = m.bits == 8 ? from[column] : column % 2 ? from[column / 2] >> 4 : from[column / 2] & 15;
      result += (scale * static_cast<float>(code) + bias) * values[i];
    });
    from += kCodeBlock * m.bits / 8;
    values += kCodeBlock;
  }
}

}  // namespace torch_fused::TORCH_FUSED_TARGET
