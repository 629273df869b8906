// What the files kernels_*.cu have in common: instantiating a set of kernels.
#pragma once

#include "kernels.h"
#include "plan.h"
#include "sequence_backward.cuh"
#include "sequence_forward.cuh"
#include "step.cuh"

namespace lstm_ext::cuda {

struct KernelNames {
  const char *sequence_forward, *sequence_backward, *step_forward, *step_backward;
};

template <Arithmetic arithmetic, class Tile, int kBatchTiles>
KernelSet kernel_set(const KernelNames& names) {
  constexpr TileSizes kSizes = tile_sizes(arithmetic);
  static_assert(kSizes.rows == Tile::kM && kSizes.columns == Tile::kK && kSizes.row_tiles == Tile::kRowTiles);
  static_assert(kSizes.register_steps == Tile::kRegisterSteps && kBatchTiles <= kSizes.most_batch_tiles);
  static_assert(kSizes.on_chip_bytes == sizeof(typename Tile::OnChip));
  static_assert(kSizes.number_bytes == sizeof(typename Tile::Number) && kSizes.sum_bytes == sizeof(typename Tile::Sum));
  return {{names.sequence_forward, sequence_forward<Tile, kBatchTiles>},
          {names.sequence_backward, sequence_backward<Tile, kBatchTiles>},
          {names.step_forward, step_forward<Tile, kBatchTiles>},
          {names.step_backward, step_backward<Tile, kBatchTiles>}};
}

}  // namespace lstm_ext::cuda
