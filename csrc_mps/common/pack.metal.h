// A pack is 16 bytes of a row held as floats: four float32 or eight 16-bit values, the widest load a thread makes.
#pragma once
#include <metal_stdlib>
using namespace metal;

inline void load_pack(device const float* from, thread float* values) {
  const float4 raw = *(device const float4*)from;
  values[0] = raw.x;
  values[1] = raw.y;
  values[2] = raw.z;
  values[3] = raw.w;
}

template <typename T>
inline void load_pack(device const T* from, thread float* values) {
  const uint4 raw = *(device const uint4*)from;
  const uint words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    values[2 * i] = float(as_type<T>(ushort(words[i] & 0xffffu)));
    values[2 * i + 1] = float(as_type<T>(ushort(words[i] >> 16)));
  }
}

inline void store_pack(device float* to, thread const float* values) {
  *(device float4*)to = float4(values[0], values[1], values[2], values[3]);
}

template <typename T>
inline void store_pack(device T* to, thread const float* values) {
  uint words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint low = as_type<ushort>(T(values[2 * i]));
    const uint high = as_type<ushort>(T(values[2 * i + 1]));
    words[i] = low | high << 16;
  }
  *(device uint4*)to = uint4(words[0], words[1], words[2], words[3]);
}

// W values that start at 16 bytes: one pack, or two of float32 where W is the pack of a 16-bit type.
template <int W, typename T>
inline void load_packs(device const T* from, thread float* values) {
  constexpr int count = 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < W; i += count) load_pack(from + i, values + i);
}

template <int W, typename T>
inline void store_packs(device T* to, thread const float* values) {
  constexpr int count = 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < W; i += count) store_pack(to + i, values + i);
}

// W values from `column` on, `fill` past the end of the row. `aligned`: every pack of the row starts at 16 bytes.
template <int W, typename T>
inline void load_columns(device const T* row, uint column, uint cols, bool aligned, thread float* values,
                         float fill = 0.0f) {
  if (aligned && column + W <= cols) {
    load_packs<W>(row + column, values);
  } else {
#pragma unroll
    for (int j = 0; j < W; j++) values[j] = column + j < cols ? float(row[column + j]) : fill;
  }
}

template <int W, typename T>
inline void store_columns(device T* row, uint column, uint cols, bool aligned, thread const float* values) {
  if (aligned && column + W <= cols) {
    store_packs<W>(row + column, values);
  } else {
#pragma unroll
    for (int j = 0; j < W; j++) {
      if (column + j < cols) row[column + j] = T(values[j]);
    }
  }
}
