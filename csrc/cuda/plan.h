// Which strategy a layer runs by, and why: see COST_MODEL.md.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "launch.h"
#include "spread.h"

namespace lstm_ext::cuda {

enum class Arithmetic : int { kBf16, kFp16, kTf32, kFp32, kFp64 };

// What a kernel's tiles measure: the planner's view of a Tile, which kernels.cuh holds against the Tile itself.
struct TileSizes {
  int rows, columns;                           // of a tile of weights
  int row_tiles;                               // that are multiplied together
  int register_steps;                          // of which a warp keeps the weights in registers
  int on_chip_bytes, number_bytes, sum_bytes;  // of a number on chip, in memory, of a sum
  int most_column_tiles;                       // 1, 2 or 4: of the batch, in one block
};

inline constexpr TileSizes kTileSizes[] = {
    {16, 16, 2, 16, 2, 2, 4, 4},  // bfloat16
    {16, 16, 2, 16, 2, 2, 4, 4},  // float16
    {16, 8, 2, 16, 4, 4, 4, 4},   // TF32
    {32, 4, 1, 16, 4, 4, 4, 2},   // float32
    {32, 2, 1, 16, 8, 8, 8, 1},   // float64
};
constexpr const TileSizes& tile_sizes(Arithmetic arithmetic) { return kTileSizes[static_cast<int>(arithmetic)]; }

Arithmetic arithmetic_of(Dtype dtype, bool tf32);

struct Question {
  Arithmetic arithmetic;
  SequenceShape shape;
  int directions;
  bool backward;
  DeviceLimits device;
  // How many blocks (cluster 1) or clusters of so many blocks the whole device runs at a time.
  int (*room)(Arithmetic, bool backward, int column_tiles, int cluster, int64_t shared_bytes, int sms);
};

struct Plan {
  std::string strategy;  // "block", "cluster", "grid" or "step"
  int column_tiles;      // of the batch: which kernel
  Spread spread;         // not for "step"
  int64_t blocks;        // of the whole launch
  int64_t shared_bytes;
  double microseconds;  // predicted, for a step of the whole batch
  int64_t workspace_bytes;
  std::vector<std::pair<std::string, std::string>> refused;  // (strategy, why)
};

// `strategy` forces one; empty chooses. Throws std::invalid_argument for an unknown name, std::runtime_error for one
// that cannot run this.
Plan make_plan(const Question& question, const std::string& strategy);

// How the path with a launch for each step cuts rows into blocks.
StepPart step_part(const Question& question, int stage, int column_tiles);

}  // namespace lstm_ext::cuda
