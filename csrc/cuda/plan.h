// Which strategy a layer runs by, and why: see COST_MODEL.md.
#pragma once

#include <compare>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../params.h"
#include "device.h"
#include "launch.h"
#include "layout.h"

namespace lstm_ext::cuda {

enum class Arithmetic : int { kBf16, kFp16, kTf32, kFp32, kFp64 };

// TF32 where that is allowed, and the device has it.
Arithmetic arithmetic_of(Dtype dtype, bool tf32, int compute_capability);

// What a kernel's tiles measure: the planner's view of a Tile, which kernels.cuh holds against the Tile itself.
struct TileSizes {
  int rows, columns;                           // of a tile of weights
  int row_tiles;                               // that are multiplied together
  int register_steps;                          // of which a warp keeps the weights in registers
  int on_chip_bytes, number_bytes, sum_bytes;  // of a number on chip, in memory, of a sum
  int most_batch_tiles;                        // 1, 2 or 4: tiles of kBatchColumns sequences in one block
  int most_step_tiles;                         // up to 8: in one warp, in the kernels with a launch for each step
};

inline constexpr TileSizes kTileSizes[] = {
    {16, 16, 2, 16, 2, 2, 4, 4, 8},  // bfloat16
    {16, 16, 2, 16, 2, 2, 4, 4, 8},  // float16
    {16, 8, 2, 16, 4, 4, 4, 4, 8},   // TF32
    {32, 4, 1, 16, 4, 4, 4, 2, 2},   // float32
    {32, 2, 1, 16, 8, 8, 8, 1, 1},   // float64
};
constexpr const TileSizes& tile_sizes(Arithmetic arithmetic) { return kTileSizes[static_cast<int>(arithmetic)]; }

// Of the one kernel for cells with options that takes a launch for each step.
constexpr int cell_step_tiles(Arithmetic arithmetic) { return tile_sizes(arithmetic).most_step_tiles > 1 ? 2 : 1; }

// The first three are one launch for all T, named by how the blocks of a team exchange h; kStep is a launch for each
// step, or two with a projection, and one more where layers are normalised.
enum class Strategy : int { kBlock, kCluster, kGrid, kStep };

constexpr Exchange exchange_of(Strategy strategy) { return static_cast<Exchange>(strategy); }  // not of kStep

inline constexpr const char* kStrategyNames[] = {"block", "cluster", "grid", "step"};
constexpr const char* name_of(Strategy strategy) { return kStrategyNames[static_cast<int>(strategy)]; }

// What is left to the planner no more. With `batch_tiles` it is one kernel, which then runs whatever was found out
// about it: so it is checked.
struct Forced {
  std::optional<Strategy> strategy;
  int batch_tiles = 0;                // 0: any
  int row_threads = kMostRowThreads;  // at most so many for a row of a cell that normalises

  auto operator<=>(const Forced&) const = default;
};

// Nothing for "", a strategy for its name, and a kernel for "grid/2"; for "step/2/32" its rows are shared by 32 threads
// at most. Throws std::invalid_argument for anything else.
Forced forced_by(const std::string& text);

// Multiprocessors that launches for all T leave to others, such as NCCL, in this process: LSTM_EXT_SM_MARGIN, until it
// is set. Throws std::invalid_argument where the variable is no number.
int sm_margin();
void set_sm_margin(int margin);

// Times that were measured on a device, of one pass over one shape.
struct MeasuredTimes {
  Arithmetic arithmetic;
  int directions;
  bool backward;
  int64_t T, B, H, P;  // P 0: no projection
  std::string date;
  std::vector<std::pair<Strategy, double>> microseconds;  // of a step of the whole batch
};

// What of a cell with options decides how it runs.
struct CellTraits {
  bool tensorflow;        // its layout of the weights
  bool keeps_h, drops_h;  // zoneout of h, recurrent dropout
  int draws;              // kinds of random numbers for each unit of a step
  Norm norm;

  static CellTraits of(const Cell& cell);
  bool normalises() const { return norm != Norm::kNone; }
  auto operator<=>(const CellTraits&) const = default;
};

// What is to be planned.
struct Problem {
  Arithmetic arithmetic;
  SequenceShape shape;
  int directions;
  bool backward;
  DeviceLimits device;
  // How many blocks (cluster 1) or clusters of so many blocks of a kernel the whole device runs at a time.
  std::function<int(const Problem&, Strategy, int batch_tiles, int cluster, int64_t shared_bytes)> resident_blocks;
  // Why the kernel of this pass must not run; empty if it may.
  std::function<std::string(Strategy, int batch_tiles)> refusal = {};
  int sm_margin = 0;
  const std::vector<MeasuredTimes>* measured = nullptr;
  std::optional<CellTraits> cell = {};  // none: the plain LSTM

  bool normalises() const { return cell && cell->normalises(); }
};

struct KernelSet;
struct CellKernelSet;
struct NormKernelSet;
struct KernelCheck;

// Everything that a launch needs beside the arrays: made once for a shape and a device, and read by many threads.
struct Plan {
  Strategy strategy;
  Arithmetic arithmetic;
  bool backward;
  int batch_tiles;                    // tiles of kBatchColumns sequences in a block; kStep: in a warp
  const KernelSet* kernels;           // for that arithmetic and so many tiles; null for a cell with options
  const CellKernelSet* cell_kernels;  // and else
  const NormKernelSet* norm_kernels;  // besides, where that normalises
  KernelCheck* check;                 // what is known of the one kernel that it launches, or that stands for them
  Layout layout;                      // not for kStep
  int num_parts;                      // kStep: launches of a step
  StepPart part[2];
  LaunchConfig config[2];  // of the launch for all T, or those of a step
  LaunchConfig rows;       // kStep of a cell that normalises, after the product
  int64_t workspace_bytes;
  int64_t hidden_offset;   // kStep with a projection: in the workspace, of h before it
  int64_t rows_offset;     // kStep of a cell that normalises: in the workspace, of its sums
  int64_t h_state_offset;  // kStep of a cell with options: of KernelCell::h_state, where the workspace goes on there
  std::optional<CellTraits> cell;
  int sm_margin;
  double microseconds;                                    // for a step of the whole batch
  std::string source;                                     // of that: "model", or where and when it was measured
  std::vector<std::pair<Strategy, std::string>> refused;  // and why

  int64_t blocks() const { return int64_t{config[0].grid_x} * config[0].grid_y; }  // of one launch
};

// Nothing can run this, and it is for `refusal` that something cannot.
struct RefusedError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The T that plans know: its two leading bits. Plans differ little with T, and lengths of ragged data are many.
int64_t planned_steps(int64_t T);

// All of the plan but the kernels. Throws std::runtime_error for a strategy that cannot run this.
Plan make_plan(const Problem& problem, const Forced& forced);

}  // namespace lstm_ext::cuda
