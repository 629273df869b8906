// A launch for each step, or two with a projection, and one more for the rows of a cell that normalises: how the
// product of a launch is cut, and by COST_MODEL.md its time.
#include <algorithm>
#include <cmath>

#include "plan_search.h"

namespace lstm_ext::cuda {
namespace {

constexpr double kLaunchMicroseconds = 2.5, kGapMicroseconds = 1.2, kOverlapMicroseconds = 0.6;  // between launches

// How much longer a stage takes the tensor cores than what they do at most, and the units that bring it its bytes.
constexpr double kMultiplySlowdown = 1.2, kBytesSlowdown = 0.7;

// Clocks, but for the last: of a launch; of a stage, in which instructions wait for each other; of an item of a thread,
// and of one more that runs beside it on the multiprocessor; of the sums of one warp that it adds up; of a cluster, and
// again for each time that it is twice as large. And the bytes in a clock that a block reads of the others' sums.
struct StepCosts {
  double start, stage, item, item_beside, sums, cluster, doubling, others_bytes;
};
constexpr StepCosts kForwardCosts{2000, 700, 1500, 1070, 150, 660, 160, 8.75},
    kBackwardCosts{540, 750, 1260, 690, 140, 600, 375, 15.5};

// Units of an item; cells with options have one.
int item_units(const Problem& problem) {
  return !problem.cell && tile_sizes(problem.arithmetic).sum_bytes == 4 ? 2 : 1;
}

// Of an item that is only summed and stored; assumed.
constexpr double kSumItemClocks = 250;

// Of a row that is normalised, in clocks: whatever its width, and for each of its units.
constexpr double kRowClocks = 2400, kRowUnitClocks = 7, kRowClocksBackward = 3000, kRowUnitClocksBackward = 9;

constexpr int kMostClusterBlocksLog2 = 3;

// Places in a launch are ints: the most units, inputs or blocks that a launch of a step counts.
constexpr int64_t kMostUnits = 1 << 28, kMostInputs = 1 << 30, kMostBlocks = INT32_MAX;

// How a launch for each step is cut: what the search for the best tries.
struct StepTile {
  int batch_tiles, warps_m_log2, warps_n_log2, k_blocks_log2;

  int sequences() const { return batch_tiles * kBatchColumns << warps_n_log2; }
};

// Whether the launch of a product leaves its sums as they are, for that of the rows of a cell that normalises.
bool leaves_sums(const Problem& problem, Product product) {
  const bool of_rows =
      product == (problem.backward && problem.shape.projected ? Product::kProjection : Product::kRecurrent);
  return problem.normalises() && of_rows;
}

// One product with a launch of its own.
StepPart step_part(const Problem& problem, Product product, const StepTile& tile) {
  const int64_t H = problem.shape.H;
  const bool of_gates = product == Product::kRecurrent && !problem.backward;
  const bool gates = of_gates && !problem.normalises();  // else their sums go to memory, and need not meet in a block
  const bool hidden = product == Product::kProjection && problem.backward;
  const int64_t units = gates || hidden ? H : of_gates ? 4 * H : problem.shape.P;
  StepPart part{};
  part.product = product;
  part.warps_m_log2 = tile.warps_m_log2;
  part.warps_n_log2 = tile.warps_n_log2;
  part.k_blocks_log2 = tile.k_blocks_log2;
  const int groups = gates ? 4 : 1, width = part.block_rows() / groups;
  while (1 << part.width_log2 < width) ++part.width_log2;
  part.rows = {width, groups, static_cast<int>(units), H};
  part.row_blocks = static_cast<int>(ceil_div(units, width));
  return part;
}

// The columns of its product.
int64_t step_columns(const Problem& problem, Product product) {
  const auto [T, B, I, H, P, projected] = problem.shape;
  if (product == Product::kProjection) return problem.backward ? P : H;
  return problem.backward ? 4 * H : P;
}

// Microseconds of one launch with so much shared memory in a block: COST_MODEL.md says how.
double step_launch_time(const Problem& problem, const StepPart& part, const StepTile& tile, int64_t shared_bytes) {
  const StepCosts& costs = problem.backward ? kBackwardCosts : kForwardCosts;
  const TileSizes& sizes = tile_sizes(problem.arithmetic);
  const double rows = part.block_rows(), sequences = tile.sequences();
  const double stages = ceil_div(step_columns(problem, part.product) * sizes.number_bytes, kStageBytes);
  const double own_stages = std::ceil(stages / part.k_blocks());
  const double batches = std::max<int64_t>(1, ceil_div(problem.shape.B, tile.sequences()));
  const double tiles = part.row_blocks * batches * problem.directions;
  // Each tile is a block's, or a cluster's; those that do not run at a time wait for the others.
  const auto resident = [&](int64_t bytes) {
    return problem.resident_blocks(problem, Strategy::kStep, tile.batch_tiles, part.k_blocks(), bytes);
  };
  const int at_a_time = resident(shared_bytes), apart = resident(problem.device.shared_per_block);
  if (at_a_time == 0 || apart == 0) return INFINITY;
  const double waves = std::ceil(tiles / at_a_time);
  // How many share a multiprocessor where most do: of large clusters fewer find one for each of their blocks.
  const double beside = std::ceil(std::min<double>(tiles, at_a_time) / apart);
  const double stage_bytes = (rows + sequences) * kStageBytes;
  const double fma = rows * sequences * (kStageBytes / sizes.number_bytes) / fma_per_clock(problem.arithmetic);
  // A warp reads its rows and its sequences: each row is read warps_n times, each sequence warps_m times.
  const double shared =
      (stage_bytes + kStageBytes * (rows * part.warps_n() + sequences * part.block_rows() / kStepRows)) /
      kSharedBytesPerClock;
  const double busy =
      std::max(kMultiplySlowdown * fma, kBytesSlowdown * std::max(shared, stage_bytes / kL2BytesPerClockOfSm));
  const double streaming =
      std::max(own_stages * (costs.stage + beside * busy), tiles / waves * stages * stage_bytes / kL2BytesPerClock);
  const double items = rows / part.rows.groups * sequences / part.k_blocks() / item_units(problem);
  const double options = problem.cell ? kCellClocks + problem.cell->draws * kDrawClocks : 0;
  const bool only_sums = leaves_sums(problem, part.product);
  const double item = only_sums ? kSumItemClocks : costs.item + options + (beside - 1) * costs.item_beside;
  const double sums = (only_sums ? kBackwardCosts.sums : costs.sums) * part.k_blocks() * part.splits();
  double epilogue = std::ceil(items / kThreads) * (item + sums);
  if (part.k_blocks() > 1) {
    const double of_others = rows * sequences * sizes.sum_bytes * part.splits() * (1 - 1.0 / part.k_blocks());
    epilogue += costs.cluster + costs.doubling * part.k_blocks_log2 + beside * of_others / costs.others_bytes;
  }
  const double gap = problem.device.compute_capability >= 90 ? kOverlapMicroseconds : kGapMicroseconds;
  const double start = costs.start + (only_sums ? 0 : cell_step_clocks(problem));
  const double clocks = waves * (start + streaming + epilogue);
  return std::max(kLaunchMicroseconds, gap + clocks * 1e3 / problem.device.clock_khz);
}

// The launch of the rows of a cell that normalises.
LaunchConfig rows_config(const Problem& problem, const Forced& forced) {
  LaunchConfig config;
  config.grid_x = static_cast<int>(std::max<int64_t>(1, problem.shape.B));
  config.grid_y = problem.directions;
  const int sum_bytes = tile_sizes(problem.arithmetic).sum_bytes;
  config.threads = std::min(row_threads(problem.shape.H, sum_bytes), forced.row_threads);
  config.shared_bytes = row_sums_bytes(sum_bytes);
  const int64_t memory = row_memory_bytes(problem.shape.H, config.threads, sum_bytes);
  if (config.shared_bytes + memory <= problem.device.shared_per_block) config.shared_bytes += memory;
  config.overlaps = problem.device.compute_capability >= 90;
  return config;
}

// Microseconds of it.
double rows_time(const Problem& problem, const LaunchConfig& config) {
  const int together = most_row_threads(tile_sizes(problem.arithmetic).sum_bytes);  // on a multiprocessor
  const double resident = double(problem.device.sms) * (together / config.threads);
  const double waves = std::ceil(double(config.grid_x) * config.grid_y / resident);
  const double H = double(problem.shape.H), options = kCellClocks + problem.cell->draws * kDrawClocks;
  const double row =
      problem.backward ? kRowClocksBackward + H * kRowUnitClocksBackward : kRowClocks + H * kRowUnitClocks;
  const double clocks = waves * (row + std::ceil(H / config.threads) * options);
  const double gap = config.overlaps ? kOverlapMicroseconds : kGapMicroseconds;
  return std::max(kLaunchMicroseconds, gap + clocks * 1e3 / problem.device.clock_khz);
}

// All ways to cut a launch that the device can run.
//
//   sequences of a warp 8 .. 64   x   warps along the rows 1 .. 8   x   along the batch   x   blocks along k
//
// Larger tiles read weights and operand less often; more blocks leave fewer multiprocessors idle.
template <class Body>
void for_step_tiles(const Problem& problem, const Body& body) {
  const TileSizes& sizes = tile_sizes(problem.arithmetic);
  const int most_k_blocks_log2 = problem.device.compute_capability >= 90 ? kMostClusterBlocksLog2 : 0;
  for (StepTile tile{1, 0, 0, 0}; tile.batch_tiles <= sizes.most_step_tiles; tile.batch_tiles *= 2)
    for (tile.warps_m_log2 = sizes.number_bytes == 2 ? 1 : 0; tile.warps_m_log2 <= 3; ++tile.warps_m_log2)
      for (tile.warps_n_log2 = tile.warps_m_log2 == 0 ? 1 : 0; tile.warps_m_log2 + tile.warps_n_log2 <= 3;
           ++tile.warps_n_log2)
        for (tile.k_blocks_log2 = 0; tile.k_blocks_log2 <= most_k_blocks_log2; ++tile.k_blocks_log2)
          if (tile.sequences() <= kMostStepSequences) body(tile);
}

}  // namespace

// All launches have the same batch tiles, as they are of one kernel.
Found find_step_plan(const Problem& problem, const Forced& forced) {
  const SequenceShape& shape = problem.shape;
  if (std::max(shape.H, shape.P) > kMostUnits) {
    throw std::runtime_error("weights: expected at most 2**28 units on a GPU, got H = " + std::to_string(shape.H) +
                             ", P = " + std::to_string(shape.P));
  }
  if (shape.I > kMostInputs) {
    throw std::runtime_error("x: expected at most 2**30 inputs on a GPU, got I = " + std::to_string(shape.I));
  }
  const TileSizes& sizes = tile_sizes(problem.arithmetic);
  Plan plan = new_plan(problem, Strategy::kStep);
  plan.num_parts = shape.projected ? 2 : 1;
  struct Best {
    double time = INFINITY;
    StepPart part;
    LaunchConfig config;
  };
  plan.microseconds = INFINITY;
  const int known = problem.backward ? kStepBackwardKnown : kStepForwardKnown;
  Found found;
  for (int batch_tiles = 1; batch_tiles <= sizes.most_step_tiles; batch_tiles *= 2) {
    if (!has_tiles(problem, true, batch_tiles)) continue;
    if (forced.batch_tiles && batch_tiles != forced.batch_tiles) continue;
    if (std::string why = refusal(problem, forced, Strategy::kStep, batch_tiles); !why.empty()) {
      found.why = std::move(why);
      continue;
    }
    Best best[2];
    for_step_tiles(problem, [&](const StepTile& tile) {
      if (tile.batch_tiles != batch_tiles) return;
      for (int n = 0; n < plan.num_parts; ++n) {
        const StepPart part = step_part(problem, static_cast<Product>(n), tile);
        const int64_t shared = step_shared_bytes(tile.sequences(), known, part, sizes.sum_bytes);
        const int64_t blocks =
            part.row_blocks * std::max<int64_t>(1, ceil_div(shape.B, tile.sequences())) * part.k_blocks();
        if (shared > problem.device.shared_per_block || blocks > kMostBlocks) continue;
        const double time = step_launch_time(problem, part, tile, shared);
        if (time >= best[n].time) continue;
        best[n] = {time, part, plan.config[n]};
        best[n].config.grid_x = static_cast<int>(blocks);
        best[n].config.shared_bytes = shared;
        best[n].config.cluster = part.k_blocks();
        best[n].config.overlaps = problem.device.compute_capability >= 90;
      }
    });
    double time = problem.normalises() ? rows_time(problem, rows_config(problem, forced)) : 0;
    for (int n = 0; n < plan.num_parts; ++n) time += best[n].time;
    if (time >= plan.microseconds) continue;
    plan.microseconds = time;
    plan.batch_tiles = batch_tiles;
    for (int n = 0; n < plan.num_parts; ++n) {
      plan.part[n] = best[n].part;
      plan.config[n] = best[n].config;
    }
  }
  if (problem.normalises()) {
    if (shape.B > kMostBlocks) throw std::runtime_error("x: expected a smaller batch for a launch");
    plan.rows = rows_config(problem, forced);
  }
  if (!plan.batch_tiles && found.why.empty()) throw std::runtime_error("x: expected a smaller batch for a launch");
  found.was_refused = !plan.batch_tiles;
  if (found.was_refused) return found;
  const int64_t state = problem.directions * shape.B * shape.H;  // numbers of c, and of h before a projection
  plan.hidden_offset = round_up(state * sizes.sum_bytes, 16);
  plan.workspace_bytes = plan.hidden_offset + (shape.projected ? state * sizes.number_bytes : 0);
  if (problem.normalises()) {
    plan.rows_offset = round_up(plan.workspace_bytes, 16);
    plan.workspace_bytes = plan.rows_offset + 4 * state * sizes.sum_bytes;
  }
  if (problem.cell) {
    const int64_t h_state = problem.directions * shape.B * shape.P;
    plan.h_state_offset = round_up(plan.workspace_bytes, 16);
    plan.workspace_bytes =
        plan.h_state_offset + (problem.backward && problem.cell->keeps_h    ? h_state * sizes.sum_bytes
                               : !problem.backward && problem.cell->drops_h ? 2 * h_state * sizes.number_bytes
                                                                            : 0);
  }
  found.plan = plan;
  found.time = plan.microseconds * shape.T;
  return found;
}

}  // namespace lstm_ext::cuda
