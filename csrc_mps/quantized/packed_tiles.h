// Which products packed_tiles.metal takes, and their grids.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

namespace torch_fused {

// A matrix of four bits goes to NVIDIA's matrix units from so many rows on: with fewer, staging the vector takes too
// much of the time. Apple's are no faster than its other units, and seven of their eight columns would be idle.
inline bool is_tiled(const at::Tensor& scales, int64_t bits, int64_t rows) {
  constexpr int64_t kTiledRows = 16384;
  return bits == 4 && scales.element_size() == 2 && rows >= kTiledRows && !scales.is_mps();
}

struct TiledGrid {
  int64_t words;    // of a lane's row in a tile
  uint32_t splits;  // simdgroups that share a row
  int64_t threadgroups, threads;
};

// For results of `outputs` rows a tile: enough simdgroups to fill a GPU.
inline TiledGrid tiled_grid(int64_t results, int64_t outputs, int64_t cols, int64_t group_size) {
  constexpr int64_t kSimdgroups = 4, kEnough = 2048;
  const auto ceiling = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t words = group_size > 32 ? 4 : 2, tiles = ceiling(results, outputs);
  const int64_t along = ceiling(cols, 32 * words),
                wanted = std::clamp<int64_t>(kEnough / tiles, 1, std::min(along, kSimdgroups));
  const int64_t splits = ceiling(along, ceiling(along, wanted)), slots = ceiling(kSimdgroups, splits);
  return {words, static_cast<uint32_t>(splits), ceiling(tiles, slots), 32 * splits * slots};
}

}  // namespace torch_fused
