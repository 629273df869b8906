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
  static_assert(kSizes.register_steps == Tile::kRegisterSteps && kBatchTiles <= kSizes.most_step_tiles);
  static_assert(kSizes.on_chip_bytes == sizeof(typename Tile::OnChip));
  static_assert(kSizes.number_bytes == sizeof(typename Tile::Number) && kSizes.sum_bytes == sizeof(typename Tile::Sum));
  KernelSet set{{names.sequence_forward, nullptr},
                {names.sequence_backward, nullptr},
                {names.step_forward, step_forward<Tile, kBatchTiles>},
                {names.step_backward, step_backward<Tile, kBatchTiles>}};
  if constexpr (kBatchTiles <= kSizes.most_batch_tiles) {
    set.sequence_forward.function = sequence_forward<Tile, kBatchTiles>;
    set.sequence_backward.function = sequence_backward<Tile, kBatchTiles>;
  }
  return set;
}

// Where the set for so many batch tiles stands among those for 1, 2, 4, ..
constexpr int set_number(int batch_tiles) { return batch_tiles > 1 ? 1 + set_number(batch_tiles / 2) : 0; }

}  // namespace lstm_ext::cuda
