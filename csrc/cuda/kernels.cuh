// What the files kernels_*.cu have in common: instantiating a set of kernels.
#pragma once

#include <deque>
#include <mutex>
#include <string>

#include "kernels.h"
#include "plan.h"
#include "sequence_backward.cuh"
#include "sequence_forward.cuh"
#include "step.cuh"

namespace lstm_ext::cuda {

// "sequence_forward<bfloat16, 16 sequences, cluster>": no two kernels have the same.
inline const char* kernel_name(const char* kernel, const char* arithmetic, int sequences, const char* rest = "") {
  static std::mutex mutex;
  static std::deque<std::string> names;  // which stay where they are
  const std::lock_guard<std::mutex> lock(mutex);
  return names
      .emplace_back(std::string(kernel) + "<" + arithmetic + ", " + std::to_string(sequences) + " sequences" + rest +
                    ">")
      .c_str();
}

template <class Tile, int kBatchTiles, Exchange kExchange>
void add_sequence_kernels(KernelSet& set, const char* arithmetic) {
  constexpr const char* kRest[] = {", block", ", cluster", ", grid"};
  constexpr int kOf = static_cast<int>(kExchange), kSequences = kBatchTiles * kBatchColumns;
  set.sequence_forward[kOf] = {kernel_name("sequence_forward", arithmetic, kSequences, kRest[kOf]),
                               sequence_forward<Tile, kBatchTiles, kExchange>};
  set.sequence_backward[kOf] = {kernel_name("sequence_backward", arithmetic, kSequences, kRest[kOf]),
                                sequence_backward<Tile, kBatchTiles, kExchange>};
}

template <Arithmetic arithmetic, class Tile, int kBatchTiles>
KernelSet kernel_set(const char* name) {
  constexpr TileSizes kSizes = tile_sizes(arithmetic);
  constexpr int kSequences = kBatchTiles * kBatchColumns;
  static_assert(kSizes.rows == Tile::kM && kSizes.columns == Tile::kK && kSizes.row_tiles == Tile::kRowTiles);
  static_assert(kSizes.rows * kSizes.row_tiles == kGroupRows);
  static_assert(kSizes.register_steps == Tile::kRegisterSteps && kBatchTiles <= kSizes.most_step_tiles);
  static_assert(kSizes.on_chip_bytes == sizeof(typename Tile::OnChip));
  static_assert(kSizes.number_bytes == sizeof(typename Tile::Number) && kSizes.sum_bytes == sizeof(typename Tile::Sum));
  KernelSet set{{{},
                 {},
                 {kernel_name("step_forward", name, kSequences), step_forward<Tile, kBatchTiles>},
                 {kernel_name("step_backward", name, kSequences), step_backward<Tile, kBatchTiles>}}};
  if constexpr (kBatchTiles <= kSizes.most_batch_tiles) {
    add_sequence_kernels<Tile, kBatchTiles, Exchange::kBlock>(set, name);
    add_sequence_kernels<Tile, kBatchTiles, Exchange::kCluster>(set, name);
    add_sequence_kernels<Tile, kBatchTiles, Exchange::kGrid>(set, name);
  }
  return set;
}

// Those of cells with options.
template <Arithmetic arithmetic, class Tile, bool kTensorflow>
CellKernelSet cell_kernel_set(const char* name) {
  constexpr int kStepTiles = cell_step_tiles(arithmetic);
  constexpr const char* kExchanges[] = {", block", ", cluster", ", grid"};
  constexpr const char* kLayout = kTensorflow ? ", TensorFlow" : "";
  CellKernelSet set;
  for (int n = 0; n < 3; ++n) {
    set.sequence_forward[n] = {kernel_name("cell_sequence_forward", name, kBatchColumns, kExchanges[n]),
                               cell_sequence_forward<Tile, 1>};
    set.sequence_backward[n] = {kernel_name("cell_sequence_backward", name, kBatchColumns, kExchanges[n]),
                                cell_sequence_backward<Tile, 1>};
  }
  set.step_forward = {kernel_name("cell_step_forward", name, kStepTiles * kBatchColumns, kLayout),
                      cell_step_forward<Tile, kStepTiles, kTensorflow>};
  set.step_backward = {kernel_name("cell_step_backward", name, kStepTiles * kBatchColumns, kLayout),
                       cell_step_backward<Tile, kStepTiles, kTensorflow>};
  return set;
}

// Where the set for so many batch tiles stands among those for 1, 2, 4, ..
constexpr int set_number(int batch_tiles) { return batch_tiles > 1 ? 1 + set_number(batch_tiles / 2) : 0; }

}  // namespace lstm_ext::cuda
