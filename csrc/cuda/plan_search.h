// The two searches of a plan: the fastest way to run all steps in one launch, and the fastest one with a launch for
// each step. What they have in common stands here; COST_MODEL.md says how both count.
#pragma once

#include <algorithm>

#include "plan.h"

namespace lstm_ext::cuda {

// Clocks and bytes of an H100; COST_MODEL.md says what each stands for, and what was measured.
inline constexpr double kSharedBytesPerClock = 128, kL2BytesPerClock = 4000, kL2BytesPerClockOfSm = 48;

// What options take besides, in a step and for each item, and random numbers of one kind.
inline constexpr double kCellStepClocks = 700, kCellStepClocksBackward = 2600, kCellClocks = 60, kDrawClocks = 80;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Multiplications of a multiprocessor in a clock.
constexpr double fma_per_clock(Arithmetic arithmetic) {
  switch (arithmetic) {
    case Arithmetic::kBf16:
    case Arithmetic::kFp16: return 1300;
    case Arithmetic::kTf32: return 650;
    case Arithmetic::kFp32: return 100;
    case Arithmetic::kFp64: return 40;
  }
  throw std::logic_error("fma_per_clock: no such arithmetic");
}

inline double cell_step_clocks(const Problem& problem) {
  return !problem.cell ? 0 : problem.backward ? kCellStepClocksBackward : kCellStepClocks;
}

// Whether a kernel, for a step or for all, has so many tiles of the batch: 1, 2, 4 or 8.
inline bool has_tiles(const Problem& problem, bool of_step, int batch_tiles) {
  const TileSizes& sizes = tile_sizes(problem.arithmetic);
  if (problem.cell) return batch_tiles == (of_step ? cell_step_tiles(problem.arithmetic) : 1);
  return batch_tiles <= (of_step ? sizes.most_step_tiles : sizes.most_batch_tiles);
}

// As Problem has it; nothing is refused that is forced to the kernel.
inline std::string refusal(const Problem& problem, const Forced& forced, Strategy strategy, int batch_tiles) {
  return problem.refusal && !forced.batch_tiles ? problem.refusal(strategy, batch_tiles) : "";
}

// What plans of all strategies have in common.
inline Plan new_plan(const Problem& problem, Strategy strategy) {
  Plan plan{};
  plan.strategy = strategy;
  plan.arithmetic = problem.arithmetic;
  plan.backward = problem.backward;
  plan.sm_margin = problem.sm_margin;
  plan.cell = problem.cell;
  plan.source = "model";
  for (LaunchConfig& config : plan.config) {
    config.grid_y = problem.directions;
    config.threads = kThreads;
  }
  return plan;
}

// A plan with the time of the whole layer, by which one is chosen; or why there is none.
struct Found {
  std::optional<Plan> plan;
  double time = 0;
  std::string why;
  bool was_refused = false;  // a kernel was left out that must not run
};

// The fastest size of a team that exchanges in one way.
Found find_sequence_plan(const Problem& problem, const Forced& forced, Strategy strategy);

// The fastest way to cut the launches of a step. Throws std::runtime_error for more than any launch counts.
Found find_step_plan(const Problem& problem, const Forced& forced);

}  // namespace lstm_ext::cuda
