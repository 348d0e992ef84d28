// A pack is 16 bytes of a row: four float32 or eight 16-bit values, the widest load a thread makes.
//
// Loading a pack and unpacking it are two steps, because a thread that unpacks a value waits for it: a kernel loads all
// that it needs and unpacks then, so that all its loads are under way together.
#pragma once
#include <metal_stdlib>
using namespace metal;

inline uint bits_of(float value) {
  return as_type<uint>(value);
}

template <typename T>
inline uint bits_of(T value) {
  return as_type<ushort>(value);
}

// The value in the low bits of a word.
template <typename T>
inline float value_of(uint word) {
  return float(as_type<T>(ushort(word & 0xffffu)));
}

template <>
inline float value_of<float>(uint word) {
  return as_type<float>(word);
}

// W values as they stand in memory: one pack, or two of float32 where W is the pack of a 16-bit type.
template <typename T, int W>
struct Pack {
  uint words[W * sizeof(T) / 4];

  float get(int j) const {
    const uint word = words[j * sizeof(T) / 4];
    return value_of<T>(j * sizeof(T) % 4 == 0 ? word : word >> 16);
  }

  // One by one, from the first on.
  void set(int j, T value) {
    const uint bits = bits_of(value);
    if (j * sizeof(T) % 4 == 0) {
      words[j * sizeof(T) / 4] = bits;
    } else {
      words[j * sizeof(T) / 4] |= bits << 16;
    }
  }

  // From `column` on, `fill` past the end of the row. `aligned`: every pack of the row starts at 16 bytes.
  void load(device const T* row, uint column, uint cols, bool aligned, float fill = 0.0f) {
    if (aligned && column + W <= cols) {
      device const uint4* from = (device const uint4*)(row + column);
#pragma unroll
      for (uint i = 0; i < W * sizeof(T) / 16; i++) {
        const uint4 raw = from[i];
        words[4 * i] = raw.x;
        words[4 * i + 1] = raw.y;
        words[4 * i + 2] = raw.z;
        words[4 * i + 3] = raw.w;
      }
    } else {
#pragma unroll
      for (int j = 0; j < W; j++) set(j, column + j < cols ? row[column + j] : T(fill));
    }
  }

  void unpack(thread float* values) const {
#pragma unroll
    for (int j = 0; j < W; j++) values[j] = get(j);
  }

  void store(device T* row, uint column) const {
    device uint4* to = (device uint4*)(row + column);
#pragma unroll
    for (uint i = 0; i < W * sizeof(T) / 16; i++) {
      to[i] = uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
    }
  }
};

// Both steps at once, for a thread that needs one pack only.
template <int W, typename T>
inline void load_columns(device const T* row, uint column, uint cols, bool aligned, thread float* values,
                         float fill = 0.0f) {
  Pack<T, W> pack;
  pack.load(row, column, cols, aligned, fill);
  pack.unpack(values);
}

template <int W, typename T>
inline void store_columns(device T* row, uint column, uint cols, bool aligned, thread const float* values) {
  if (aligned && column + W <= cols) {
    Pack<T, W> pack;
#pragma unroll
    for (int j = 0; j < W; j++) pack.set(j, T(values[j]));
    pack.store(row, column);
  } else {
#pragma unroll
    for (int j = 0; j < W; j++) {
      if (column + j < cols) row[column + j] = T(values[j]);
    }
  }
}
