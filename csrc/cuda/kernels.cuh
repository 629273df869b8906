// What the files kernels_*.cu have in common: instantiating a set of kernels.
#pragma once

#include "kernels.h"
#include "sequence_backward.cuh"
#include "sequence_forward.cuh"
#include "step.cuh"

namespace lstm_ext::cuda {

struct KernelNames {
  const char *sequence_forward, *sequence_backward, *step_forward, *step_backward;
};

template <Arithmetic arithmetic, class Tile, int kTiles>
KernelSet kernel_set(const KernelNames& names) {
  constexpr TileSizes kSizes = tile_sizes(arithmetic);
  static_assert(kSizes.rows == Tile::kM && kSizes.columns == Tile::kK && kSizes.row_tiles == Tile::kRowTiles);
  static_assert(kSizes.register_steps == Tile::kRegisterSteps && kTiles <= kSizes.most_column_tiles);
  static_assert(kSizes.on_chip_bytes == sizeof(typename Tile::OnChip));
  static_assert(kSizes.number_bytes == sizeof(typename Tile::Number) && kSizes.sum_bytes == sizeof(typename Tile::Sum));
  return {{names.sequence_forward, sequence_forward<Tile, kTiles>},
          {names.sequence_backward, sequence_backward<Tile, kTiles>},
          {names.step_forward, step_forward<Tile, kTiles>},
          {names.step_backward, step_backward<Tile, kTiles>},
          [](int warps_m) { return int64_t{StepBlock<Tile, kTiles>::shared_bytes(warps_m)}; }};
}

}  // namespace lstm_ext::cuda
