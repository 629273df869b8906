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

template <class Tile, int kTiles>
KernelSet kernel_set(const KernelNames& names) {
  return {{names.sequence_forward, sequence_forward<Tile, kTiles>},
          {names.sequence_backward, sequence_backward<Tile, kTiles>},
          {names.step_forward, step_forward<Tile, kTiles>},
          {names.step_backward, step_backward<Tile, kTiles>},
          [](int warps_m) { return int64_t{StepBlock<Tile, kTiles>::shared_bytes(warps_m)}; }};
}

// The planner knows the tiles by their sizes.
template <class Tile>
bool agrees(const TileSizes& sizes) {
  return sizes.rows == Tile::kM && sizes.columns == Tile::kK && sizes.row_tiles == Tile::kRowTiles &&
         sizes.register_steps == Tile::kRegisterSteps && sizes.on_chip_bytes == sizeof(typename Tile::OnChip) &&
         sizes.number_bytes == sizeof(typename Tile::Number) && sizes.sum_bytes == sizeof(typename Tile::Sum);
}

}  // namespace lstm_ext::cuda
