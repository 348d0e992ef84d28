// Which products packed_tiles.metal takes, and their grids.
#pragma once

#include <ATen/core/Tensor.h>

#include "../decode/decode_params.h"

namespace torch_fused {

// A matrix of four bits goes to NVIDIA's matrix units from so many rows on: with fewer, staging the vector takes too
// much of the time. Apple's are no faster than its other units, and seven of their eight columns would be idle.
inline bool is_tiled(const at::Tensor& scales, int64_t bits, int64_t rows) {
  constexpr int64_t kTiledRows = 8192;
  return bits == 4 && scales.element_size() == 2 && rows >= kTiledRows && !scales.is_mps();
}

struct TiledGrid {
  int64_t words;    // of a lane's row in a tile
  uint32_t splits;  // simdgroups that share a row
  uint32_t rounds;  // tiles of rows that a simdgroup takes one after the other
  int64_t threadgroups, threads;
};

// For results of `outputs` rows a tile.
inline TiledGrid tiled_grid(int64_t results, int64_t outputs, int64_t cols, int64_t group_size) {
  // Tiles to fill a GPU, simdgroups that it keeps at once, and slots for tiles in a threadgroup.
  constexpr int64_t kEnough = 2048, kResident = 2640, kSlots = 4;
  const auto ceiling = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t words = group_size > 32 ? 4 : 2, tiles = ceiling(results, outputs);
  const bool several = cols > 32 * words;  // tiles of a row
  const int64_t splits = tiles < kEnough && several ? 2 : 1;
  // A vector that is staged whole serves both rounds. More of them would leave too few threadgroups to share evenly.
  const int64_t rounds = splits == 1 && several && cols <= kStagedWords * 8 && tiles > kResident ? 2 : 1;
  return {words, static_cast<uint32_t>(splits), static_cast<uint32_t>(rounds), ceiling(tiles, kSlots * rounds),
          32 * kSlots * splits};
}

}  // namespace torch_fused
