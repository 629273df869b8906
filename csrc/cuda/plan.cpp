#include "plan.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <optional>
#include <stdexcept>

namespace lstm_ext::cuda {
namespace {

// Clocks and bytes of an H100; assumed, until they are measured. COST_MODEL.md says what each stands for.
constexpr double kSyncClocks = 40, kProductClocks = 100;
constexpr double kForwardClocks = 470, kBackwardClocks = 650, kItemClocks = 150;  // the pointwise part
constexpr double kClusterClocks = 500, kGridClocks = 1100;
constexpr double kSharedBytesPerClock = 128, kL2BytesPerClock = 3000, kL2BytesPerClockOfSm = 48;
constexpr double kLaunchMicroseconds = 2.5, kLoadClocksPerNumber = 0.6;
constexpr double kGapMicroseconds = 1.2, kOverlapMicroseconds = 0.6;  // between launches
constexpr double kStepStartClocks = 1000, kStageClocks = 300, kClusterSyncClocks = 350, kClusterBytesPerClock = 32;
constexpr double kEpilogueClocks = 700, kEpilogueItemClocks = 90;
constexpr int kMostClusterBlocksLog2 = 3, kMostStepSequences = 128;

constexpr int64_t kTileBytes = 512;  // of a tile of weights: 16 bytes in each of 32 lanes

constexpr int kMostClusterBlocks = 16;  // where the device allows more than the portable 8

// How many k tiles of a group of rows a warp may have in registers together: what product.cuh has straight code for.
constexpr int kRuns[] = {1, 2, 4, 8, 12, 16};

// Places in a layout and in a launch are ints. Weights of so many units are on no chip; and so many units, or blocks,
// are the most that a launch of a step counts.
constexpr int64_t kMostUnitsOnChip = 1 << 15, kMostUnits = 1 << 28, kMostBlocks = INT32_MAX;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Multiplications of a multiprocessor in a clock.
double fma_per_clock(Arithmetic arithmetic) {
  switch (arithmetic) {
    case Arithmetic::kBf16:
    case Arithmetic::kFp16: return 1300;
    case Arithmetic::kTf32: return 650;
    case Arithmetic::kFp32: return 100;
    case Arithmetic::kFp64: return 40;
  }
  throw std::logic_error("fma_per_clock: no such arithmetic");
}

// One way to run all steps in one launch: what the search tries.
struct Candidate {
  Exchange exchange;
  int ranks, batch_tiles, team_batch;
};

// What is far too large for a chip stays an int that no device has room for.
int as_int(int64_t bytes) { return static_cast<int>(std::min<int64_t>(bytes, INT32_MAX)); }

// Lays a block's shared memory out, one thing after the other, each aligned for reads of 16 bytes.
struct SharedMemory {
  int64_t used = 0;
  int take(int64_t bytes) {
    const int64_t offset = used;
    used += round_up(bytes, 16);
    return as_int(offset);
  }
};

// What follows from a candidate: its layout, and by COST_MODEL.md its time.
class Planner {
 public:
  explicit Planner(const Problem& problem) : problem_(problem), sizes_(tile_sizes(problem.arithmetic)) {}

  // How many of `count` units a rank has: whole accesses of what it sends. A cluster's forward exchange is of whole
  // tiles of the operand, a grid's of two words; backward it is 16 bytes of sums.
  int units_of_rank(int64_t count, const Candidate& candidate) const {
    if (candidate.exchange == Exchange::kBlock) return static_cast<int>(count);
    const int sums = 16 / sizes_.sum_bytes, words = 8 / sizes_.on_chip_bytes;
    const int unit = problem_.backward ? sums : candidate.exchange == Exchange::kCluster ? sizes_.columns : words;
    return static_cast<int>(round_up(ceil_div(count, candidate.ranks), unit));
  }

  Layout layout(const Candidate& candidate) const {
    const auto [T, B, I, H, P, projected] = problem_.shape;
    const int U = units_of_rank(H, candidate), p = projected ? units_of_rank(P, candidate) : U;
    const Share gates = share(U, 4, H), units = share(U, 1, H), h = share(p, 1, P);
    Layout layout{};
    layout.exchange = candidate.exchange;
    layout.ranks = candidate.ranks;
    layout.team_batch = candidate.team_batch;
    layout.num_products = projected ? 2 : 1;
    layout.units = units.items;
    ProductLayout &recurrent = layout.product[0], &projection = layout.product[1];
    recurrent.rows = problem_.backward ? h : gates;
    recurrent.columns = problem_.backward ? gates : h;
    projection.rows = problem_.backward ? units : h;
    projection.columns = problem_.backward ? h : units;
    cut_into_tiles(recurrent, sizes_.register_steps, candidate.ranks);
    if (projected) cut_into_tiles(projection, 0, candidate.ranks);
    place_in_memory(layout, candidate);
    return layout;
  }

  // Microseconds of one step of one team_batch.
  double step_time(const Layout& layout) const {
    double clocks = 0;
    for (int n = 0; n < layout.num_products; ++n) clocks += product_clocks(layout, layout.product[n]);
    return microseconds(clocks);
  }

  double microseconds(double clocks) const { return clocks * 1e3 / problem_.device.clock_khz; }

  // Until a block has its weights.
  double load_time(const Layout& layout) const {
    double numbers = 0;
    for (int n = 0; n < layout.num_products; ++n)
      numbers += double(layout.product[n].row_groups) * kGroupRows * layout.product[n].k_tiles * sizes_.columns;
    return microseconds(numbers * kLoadClocksPerNumber);
  }

 private:
  int item_units() const { return sizes_.on_chip_bytes == 2 ? 2 : 1; }  // those that a thread takes together

  Share share(int width, int groups, int64_t limit) const {
    const int together = 16 / sizes_.sum_bytes;
    return {width,
            groups,
            static_cast<int>(limit),
            limit,
            Divisor(static_cast<int>(ceil_div(width, item_units()))),
            Divisor(static_cast<int>(ceil_div(width, together)))};
  }

  // Which tiles of the weights each warp has. The registers are the first product's. Forward the rows are the rank's
  // own, and backward the columns.
  void cut_into_tiles(ProductLayout& product, int register_steps, int ranks) const {
    const int64_t rows = int64_t{problem_.backward ? ranks : 1} * product.rows.per_rank();
    const int64_t columns = int64_t{problem_.backward ? 1 : ranks} * product.columns.per_rank();
    product.row_groups = static_cast<int>(ceil_div(rows, kGroupRows));
    while (2 << product.log_warps_m <= std::min(product.row_groups, kWarps)) ++product.log_warps_m;
    const int splits = kWarps >> product.log_warps_m;
    const int64_t k_tiles = ceil_div(ceil_div(columns, sizes_.columns), splits);
    const int* run = std::find_if(std::begin(kRuns), std::end(kRuns), [&](int one) { return one >= k_tiles; });
    product.run = run == std::end(kRuns) ? kRuns[std::size(kRuns) - 1] : *run;
    // Padding costs multiplications with zeros; what is beyond the registers is taken two by two.
    product.warp_k_tiles =
        static_cast<int>(k_tiles <= product.run ? (register_steps ? product.run : k_tiles) : round_up(k_tiles, 2));
    product.k_tiles = splits * product.warp_k_tiles;
    const int groups = static_cast<int>(ceil_div(product.row_groups, 1 << product.log_warps_m));
    const int in_registers = std::min(groups, register_steps / product.run) * product.run;
    product.shared_steps = groups * product.warp_k_tiles - in_registers;
  }

  // The operands, inboxes and tiles of each product are its own; partial sums serve both, one after the other.
  void place_in_memory(Layout& layout, const Candidate& candidate) const {
    const bool backward = problem_.backward, cluster = candidate.exchange == Exchange::kCluster;
    const int64_t sequences = candidate.batch_tiles * kBatchColumns, batch = layout.team_batch;
    const int sum_bytes = sizes_.sum_bytes, number_bytes = sizes_.number_bytes;
    SharedMemory memory;
    int64_t partial = 0;
    while (1 << layout.log_rows < batch) ++layout.log_rows;
    for (int n = 0; n < layout.num_products; ++n) {
      ProductLayout& product = layout.product[n];
      const int64_t splits = kWarps >> product.log_warps_m;
      product.operand_bytes = as_int(int64_t{product.k_tiles} * sizes_.columns * sequences * sizes_.on_chip_bytes);
      product.tiles_offset = memory.take(int64_t{kWarps} * product.shared_steps * sizes_.row_tiles * kTileBytes);
      product.operand_offset = memory.take(int64_t{cluster && !backward ? 2 : 1} * product.operand_bytes);
      product.inbox_bytes = as_int(backward && cluster ? layout.ranks * batch * product.rows.width * sum_bytes : 0);
      product.inbox_offset = memory.take(int64_t{2} * product.inbox_bytes);
      product.words_offset = layout.exchange_words;
      layout.exchange_words += 2 * words(layout, product);
      product.partial_stride = product.row_groups * kGroupRows + kPartialPadding;
      partial = std::max(partial, splits * sequences * product.partial_stride * sum_bytes);
    }
    const int64_t units = int64_t{layout.units.value} * item_units();
    layout.partial_offset = memory.take(partial);
    layout.bias_offset = memory.take(backward ? 0 : units * 4 * sum_bytes);
    // A copy of numbers of 2 bytes may start 2 bytes early, and is read 4 bytes at a time.
    const int64_t copied = backward ? units * number_bytes + 4 : units * sum_bytes;
    layout.gate_row = as_int(round_up(copied, 16));
    layout.cell_row = as_int(backward ? round_up(units * sum_bytes, 16) : 0);
    layout.h_row = as_int(
        backward ? round_up(int64_t{layout.product[0].rows.items.value} * item_units() * number_bytes + 4, 16) : 0);
    layout.inputs_bytes = as_int(batch * (4 * layout.gate_row + 2 * layout.cell_row + layout.h_row));
    const int64_t buffers = candidate.exchange == Exchange::kGrid ? 3 : 2;  // as sequence.cuh takes turns
    layout.inputs_offset = memory.take(buffers * layout.inputs_bytes);
    layout.state_offset = memory.take(batch * units * sum_bytes);
    layout.cells_offset = memory.take(backward ? batch * units * sum_bytes : 0);
    layout.moments_offset = memory.take((kMomentSteps + 1) * batch * static_cast<int64_t>(sizeof(Moment)));
    layout.barriers_offset = memory.take(4 * sizeof(uint64_t));
    layout.shared_bytes = as_int(memory.used);
  }

  // Of 64 bits that a team needs for one exchange of a product.
  int64_t words(const Layout& layout, const ProductLayout& product) const {
    if (layout.exchange != Exchange::kGrid) return 0;
    if (!problem_.backward) {
      const int64_t row_words = int64_t{sizes_.columns} * sizes_.on_chip_bytes / 4;
      return (int64_t{product.k_tiles} << layout.log_rows) * row_words;
    }
    const int64_t together = 8 / sizes_.sum_bytes;  // ranks whose sums are read together
    return ceil_div(layout.ranks, together) * layout.ranks * layout.team_batch * product.rows.width * 2;
  }

  // Of one product of a step with what comes before and after it: an exchange, and the pointwise part.
  double product_clocks(const Layout& layout, const ProductLayout& product) const {
    const double rows = double(product.row_groups) * kGroupRows, columns = double(product.k_tiles) * sizes_.columns;
    const double batch = round_up(layout.team_batch, kBatchColumns);
    const double fma = rows * columns * batch / fma_per_clock(problem_.arithmetic);
    const double from_shared =
        double(kWarps) * product.shared_steps * sizes_.row_tiles * kTileBytes / kSharedBytesPerClock;
    const double items = std::ceil(double(product.rows.items.value) * layout.team_batch / kThreads);
    double clocks = kProductClocks + std::max(fma, from_shared) + 2 * kSyncClocks +
                    (problem_.backward ? kBackwardClocks : kForwardClocks) + items * kItemClocks;
    // What a block receives.
    const Share& own = problem_.backward ? product.rows : product.columns;
    const int number_bytes = problem_.backward ? sizes_.sum_bytes : sizes_.on_chip_bytes;
    const double bytes = double(layout.team_batch) * layout.ranks * own.per_rank() * number_bytes;
    if (layout.exchange == Exchange::kCluster) clocks += kClusterClocks + bytes / kClusterBytesPerClock;
    if (layout.exchange == Exchange::kGrid) {
      const double blocks = double(layout.ranks) * std::max(layout.teams, 1) * problem_.directions;
      clocks += kGridClocks + 2 * std::max(bytes / kL2BytesPerClockOfSm, bytes * blocks / kL2BytesPerClock);
    }
    return clocks;
  }

  const Problem& problem_;
  const TileSizes& sizes_;
};

// Multiprocessors for launches for all T.
int usable_sms(const Problem& problem) { return std::max(1, problem.device.sms - problem.sm_margin); }

// As Problem has it; nothing is refused that is forced to the kernel.
std::string refusal(const Problem& problem, const Forced& forced, Strategy strategy, int batch_tiles) {
  return problem.refusal && !forced.batch_tiles ? problem.refusal(strategy, batch_tiles) : "";
}

constexpr std::pair<Strategy, Exchange> kSequenceStrategies[] = {
    {Strategy::kBlock, Exchange::kBlock}, {Strategy::kCluster, Exchange::kCluster}, {Strategy::kGrid, Exchange::kGrid}};

constexpr Strategy strategy_of(Exchange exchange) {
  for (const auto& [strategy, its] : kSequenceStrategies)
    if (its == exchange) return strategy;
  return Strategy::kStep;
}

struct Choice {
  Candidate candidate;
  Layout layout;
  double time = INFINITY;  // of the whole layer
  double per_step = 0;     // of all tiles of the batch
};

// Tries all sizes of a team with one exchange.
//
//   batch tiles 1, 2, 4   x   ranks   kBlock: 1    kCluster: 2, 4, 8, 16    kGrid: 2 .. all multiprocessors of a
//   direction
//
// More ranks have fewer weights each, and more of them to hear from. More batch tiles need more registers for sums, and
// let a team take more sequences at a time, which it does only where there would be more teams than can run at once.
class Search {
 public:
  Search(const Problem& problem, const Forced& forced) : problem_(problem), forced_(forced), planner_(problem) {}

  // The fastest way with this exchange, or why there is none.
  std::optional<Choice> best(Exchange exchange, std::string& why) {
    best_ = {};
    fits_ = false;
    least_shared_ = INT64_MAX;
    was_refused_ = false;
    const int most = most_ranks(exchange);
    if (std::max(problem_.shape.H, problem_.shape.P) > kMostUnitsOnChip) {
      why = "no chip holds the weights of more than " + std::to_string(kMostUnitsOnChip) + " units";
      return {};
    }
    if (most < 1) {
      why = exchange == Exchange::kCluster ? "no clusters before compute capability 9.0"
            : problem_.device.cooperative  ? "too few multiprocessors"
                                           : "no cooperative launch";
      return {};
    }
    // In this order, and only what is faster replaces what was found: of equals the first.
    for (int tiles = 1; tiles <= tile_sizes(problem_.arithmetic).most_batch_tiles; tiles *= 2) {
      if (forced_.batch_tiles && tiles != forced_.batch_tiles) continue;
      if (std::string refused = refusal(problem_, forced_, strategy_of(exchange), tiles); !refused.empty()) {
        why = std::move(refused);
        was_refused_ = true;
        continue;
      }
      for (int ranks = exchange == Exchange::kBlock ? 1 : 2; ranks <= most;
           ranks = exchange == Exchange::kCluster ? ranks * 2 : ranks + 1)
        try_ranks(exchange, ranks, tiles);
    }
    if (std::isinf(best_.time)) {
      if (was_refused_) return {};
      why = fits_ ? "the device cannot run a team of blocks with so much shared memory at a time"
            : least_shared_ < INT64_MAX
                ? "needs at least " + std::to_string(least_shared_) + " bytes of shared memory in a block, of " +
                      std::to_string(problem_.device.shared_per_block)
                : "no room for a team of blocks";
      return {};
    }
    return best_;
  }

  // Whether the last search left a kernel out that it was told not to run.
  bool was_refused() const { return was_refused_; }

 private:
  // 0 where the device cannot do it at all.
  int most_ranks(Exchange exchange) const {
    const int sms = usable_sms(problem_) / problem_.directions;
    if (exchange == Exchange::kBlock) return 1;
    if (exchange == Exchange::kCluster) return problem_.device.compute_capability >= 90 ? kMostClusterBlocks : 0;
    return problem_.device.cooperative && sms >= 2 ? sms : 0;
  }

  // How many teams of each direction can run at a time; 0 if not one can. More of them wait, but for those of kGrid,
  // which must all run.
  int64_t resident_teams(const Candidate& c, const Layout& layout) const {
    const int cluster = c.exchange == Exchange::kCluster ? c.ranks : 1;
    int resident = problem_.resident_blocks(problem_, static_cast<Strategy>(c.exchange), c.batch_tiles, cluster,
                                            layout.shared_bytes);
    // Blocks spread over all multiprocessors before two of them share one.
    if (problem_.sm_margin > 0) resident = std::min(resident, usable_sms(problem_) / cluster);
    if (c.exchange == Exchange::kGrid) return resident / problem_.directions / c.ranks;
    return resident == 0 ? 0 : std::max(1, resident / problem_.directions);
  }

  void try_ranks(Exchange exchange, int ranks, int tiles) {
    if (ranks > 2 && int64_t{ranks} > problem_.shape.H) return;  // ranks without a unit
    Candidate c{exchange, ranks, tiles, tiles * kBatchColumns};
    Layout layout = planner_.layout(c);
    least_shared_ = std::min<int64_t>(least_shared_, layout.shared_bytes);
    if (layout.shared_bytes > problem_.device.shared_per_block) return;
    fits_ = true;
    const int64_t B = problem_.shape.B, resident = resident_teams(c, layout);
    if (resident == 0) return;
    // As few sequences in a team as leave none waiting, if that can be.
    const int64_t spread = forced_.batch_tiles ? 1 : resident;  // a kernel that is checked uses all of its tiles
    c.team_batch = static_cast<int>(std::clamp<int64_t>(ceil_div(B, spread), 1, c.team_batch));
    layout = planner_.layout(c);
    const int64_t batches = std::max<int64_t>(1, ceil_div(B, c.team_batch));
    layout.teams = static_cast<int>(std::min(batches, resident));
    const double per_step = planner_.step_time(layout) * ceil_div(batches, layout.teams);
    const double time = per_step * problem_.shape.T + planner_.load_time(layout);
    if (time < best_.time) best_ = {c, layout, time, per_step};
  }

  const Problem& problem_;
  const Forced& forced_;
  Planner planner_;
  Choice best_;
  bool was_refused_ = false;          // some kernel
  bool fits_ = false;                 // some candidate's block fits into a multiprocessor
  int64_t least_shared_ = INT64_MAX;  // that any candidate's block needs
};

// How a launch for each step is cut: what the search for the best tries.
struct StepTile {
  int batch_tiles, warps_m_log2, warps_n_log2, k_blocks_log2;

  int sequences() const { return batch_tiles * kBatchColumns << warps_n_log2; }
};

// One product with a launch of its own.
StepPart step_part(const Problem& problem, Product product, const StepTile& tile) {
  const int64_t H = problem.shape.H;
  const bool gates = product == Product::kRecurrent && !problem.backward;
  const bool hidden = product == Product::kProjection && problem.backward;
  const int64_t units = gates || hidden ? H : problem.shape.P;
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

// Microseconds of one launch: COST_MODEL.md says how.
double step_launch_time(const Problem& problem, const StepPart& part, const StepTile& tile) {
  const TileSizes& sizes = tile_sizes(problem.arithmetic);
  const double rows = part.block_rows(), sequences = tile.sequences();
  const double stages = ceil_div(step_columns(problem, part.product) * sizes.number_bytes, kStageBytes);
  const double own_stages = std::ceil(stages / part.k_blocks());
  const double tiles = double(part.row_blocks) * ceil_div(problem.shape.B, tile.sequences()) * problem.directions;
  const double blocks_of_sm = std::ceil(tiles * part.k_blocks() / problem.device.sms);
  const double stage_bytes = (rows + sequences) * kStageBytes;
  const double fma = rows * sequences * (kStageBytes / sizes.number_bytes) / fma_per_clock(problem.arithmetic);
  // A warp reads its rows and its sequences: each row is read warps_n times, each sequence warps_m times.
  const double shared =
      (stage_bytes + kStageBytes * (rows * part.warps_n() + sequences * part.block_rows() / kStepRows)) /
      kSharedBytesPerClock;
  const double stage = std::max({fma, shared, stage_bytes / kL2BytesPerClockOfSm});
  const double streaming = std::max(blocks_of_sm * own_stages * std::max(stage, kStageClocks / blocks_of_sm),
                                    tiles * stages * stage_bytes / kL2BytesPerClock);
  const double units = rows / part.rows.groups * sequences / part.k_blocks();
  const double epilogue = kEpilogueClocks + blocks_of_sm * std::ceil(units / kThreads) * kEpilogueItemClocks +
                          (part.k_blocks() > 1 ? 2 * kClusterSyncClocks + blocks_of_sm * rows * sequences *
                                                                              sizes.sum_bytes / kClusterBytesPerClock
                                               : 0);
  const double gap = problem.device.compute_capability >= 90 ? kOverlapMicroseconds : kGapMicroseconds;
  const double clocks = kStepStartClocks + streaming + epilogue;
  return std::max(kLaunchMicroseconds, gap + clocks * 1e3 / problem.device.clock_khz);
}

// What plans of all strategies have in common.
Plan new_plan(const Problem& problem, Strategy strategy) {
  Plan plan{};
  plan.strategy = strategy;
  plan.arithmetic = problem.arithmetic;
  plan.backward = problem.backward;
  plan.sm_margin = problem.sm_margin;
  plan.source = "model";
  for (LaunchConfig& config : plan.config) {
    config.grid_y = problem.directions;
    config.threads = kThreads;
  }
  return plan;
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

// The fastest way to cut the launches of a step; all have the same batch tiles, as they are of one kernel. Where all
// kernels are refused it is one of these.
Plan step_plan(const Problem& problem, const Forced& forced) {
  const SequenceShape& shape = problem.shape;
  if (std::max(shape.H, shape.P) > kMostUnits) {
    throw std::runtime_error("weights: expected at most 2**28 units on a GPU, got H = " + std::to_string(shape.H) +
                             ", P = " + std::to_string(shape.P));
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
  int fastest_tiles = 0;
  for (int batch_tiles = 1; batch_tiles <= sizes.most_step_tiles; batch_tiles *= 2) {
    if (forced.batch_tiles && batch_tiles != forced.batch_tiles) continue;
    plan.batch_tiles = batch_tiles;
    if (!refusal(problem, forced, Strategy::kStep, batch_tiles).empty()) continue;
    Best best[2];
    for_step_tiles(problem, [&](const StepTile& tile) {
      if (tile.batch_tiles != batch_tiles) return;
      for (int n = 0; n < plan.num_parts; ++n) {
        const StepPart part = step_part(problem, static_cast<Product>(n), tile);
        const int64_t shared = step_shared_bytes(tile.sequences(), part, sizes.sum_bytes);
        const int64_t blocks =
            part.row_blocks * std::max<int64_t>(1, ceil_div(shape.B, tile.sequences())) * part.k_blocks();
        if (shared > problem.device.shared_per_block || blocks > kMostBlocks) continue;
        const double time = step_launch_time(problem, part, tile);
        if (time >= best[n].time) continue;
        best[n] = {time, part, plan.config[n]};
        best[n].config.grid_x = static_cast<int>(blocks);
        best[n].config.shared_bytes = shared;
        best[n].config.cluster = part.k_blocks();
        best[n].config.overlaps = problem.device.compute_capability >= 90;
      }
    });
    double time = 0;
    for (int n = 0; n < plan.num_parts; ++n) time += best[n].time;
    if (time >= plan.microseconds) continue;
    plan.microseconds = time;
    fastest_tiles = batch_tiles;
    for (int n = 0; n < plan.num_parts; ++n) {
      plan.part[n] = best[n].part;
      plan.config[n] = best[n].config;
    }
  }
  if (!fastest_tiles && !refusal(problem, forced, Strategy::kStep, plan.batch_tiles).empty()) return plan;
  if (!fastest_tiles) throw std::runtime_error("x: expected a smaller batch for a launch");
  plan.batch_tiles = fastest_tiles;
  const int64_t state = problem.directions * shape.B * shape.H;  // numbers of c, and of h before a projection
  plan.hidden_offset = round_up(state * sizes.sum_bytes, 16);
  plan.workspace_bytes = plan.hidden_offset + (shape.projected ? state * sizes.number_bytes : 0);
  return plan;
}

Plan sequence_plan(const Problem& problem, Strategy strategy, const Choice& choice) {
  const Layout& layout = choice.layout;
  Plan plan = new_plan(problem, strategy);
  plan.batch_tiles = choice.candidate.batch_tiles;
  plan.layout = layout;
  plan.microseconds = choice.per_step;
  LaunchConfig& config = plan.config[0];
  config.grid_x = layout.ranks * layout.teams;
  config.shared_bytes = layout.shared_bytes;
  config.cluster = strategy == Strategy::kCluster ? layout.ranks : 1;
  config.cooperative = strategy == Strategy::kGrid;
  if (strategy == Strategy::kGrid)
    plan.workspace_bytes = problem.directions * layout.teams * layout.exchange_words * int64_t{sizeof(*layout.words)};
  return plan;
}

// How far a layer is from one that was measured: 1 stands for twice the batch, 1.4 times the units or 16 times the
// steps. Beyond kFarthest a measurement tells nothing.
constexpr double kFarthest = 1;
double distance(const MeasuredTimes& measured, const SequenceShape& shape) {
  const auto octaves = [](int64_t a, int64_t b) { return std::abs(std::log2(double(std::max<int64_t>(a, 1)) / b)); };
  return octaves(shape.T, planned_steps(measured.T)) / 4 + octaves(shape.B, measured.B) +
         2 * octaves(shape.H, measured.H) + (shape.projected ? 2 * octaves(shape.P, measured.P) : 0);
}

// The nearest one, the first of equals; null where none is near.
const MeasuredTimes* nearest(const Problem& problem) {
  if (!problem.measured) return nullptr;
  const MeasuredTimes* found = nullptr;
  double least = kFarthest;
  for (const MeasuredTimes& each : *problem.measured) {
    const bool of_its_kind = each.arithmetic == problem.arithmetic && each.directions == problem.directions &&
                             each.backward == problem.backward && (each.P > 0) == problem.shape.projected;
    if (!of_its_kind) continue;
    const double far = distance(each, problem.shape);
    if (far < least || (far == least && !found)) {
      found = &each;
      least = far;
    }
  }
  return found;
}

std::string text_of(const MeasuredTimes& measured) {
  return "measured at T" + std::to_string(measured.T) + " B" + std::to_string(measured.B) + " H" +
         std::to_string(measured.H) + (measured.P ? " P" + std::to_string(measured.P) : "") + " on " + measured.date;
}

// Strategies that can run a layer, with the time of the whole layer by which one is chosen.
using Possible = std::vector<std::pair<Plan, double>>;

// Puts what was measured in place of what is predicted. Predictions are not held against measurements: the others come
// last, and are taken where nothing that was measured can run.
void use_measured(Possible& possible, const MeasuredTimes& measured, int64_t T) {
  const auto of = [&](Strategy strategy) {
    return std::find_if(measured.microseconds.begin(), measured.microseconds.end(),
                        [&](const auto& each) { return each.first == strategy; });
  };
  const auto was_measured = [&](const auto& each) { return of(each.first.strategy) != measured.microseconds.end(); };
  const auto rest = std::stable_partition(possible.begin(), possible.end(), was_measured);
  for (auto each = possible.begin(); each != rest; ++each) {
    each->first.microseconds = of(each->first.strategy)->second;
    each->first.source = text_of(measured);
    each->second = each->first.microseconds * T;
  }
}

// Why another strategy was not taken.
std::string slower(const Plan& other, const Plan& chosen) {
  const bool by_measurement = chosen.source != "model";
  if (other.source != chosen.source) return "not " + chosen.source + ", as " + name_of(chosen.strategy) + " was";
  char text[96];
  std::snprintf(text, sizeof(text), "%s %.2f us a step, %s %.2f", by_measurement ? "measured" : "predicted",
                other.microseconds, name_of(chosen.strategy), chosen.microseconds);
  return text;
}

// The first of the fastest, among those that know their time from the same source as the first.
const Plan& fastest(const Possible& possible) {
  const std::pair<Plan, double>* chosen = &possible[0];
  for (const auto& each : possible)
    if (each.first.source == chosen->first.source && each.second < chosen->second) chosen = &each;
  return chosen->first;
}

constexpr int kMarginUnset = -1;
std::atomic<int> margin{kMarginUnset};

int margin_of_environment() {
  const char* text = std::getenv("LSTM_EXT_SM_MARGIN");
  if (!text || !*text) return 0;
  int value = 0;
  const char* const end = text + std::strlen(text);
  const auto [stop, error] = std::from_chars(text, end, value);
  if (error != std::errc() || stop != end || value < 0)
    throw std::invalid_argument("LSTM_EXT_SM_MARGIN: expected a number of multiprocessors from 0 on, got '" +
                                std::string(text) + "'");
  return value;
}

}  // namespace

Arithmetic arithmetic_of(Dtype dtype, bool tf32, int compute_capability) {
  switch (dtype) {
    case Dtype::kBFloat16: return Arithmetic::kBf16;
    case Dtype::kFloat16: return Arithmetic::kFp16;
    case Dtype::kFloat32: return tf32 && compute_capability >= 80 ? Arithmetic::kTf32 : Arithmetic::kFp32;
    case Dtype::kFloat64: return Arithmetic::kFp64;
  }
  throw std::logic_error("arithmetic_of: no such dtype");
}

Forced forced_by(const std::string& text) {
  if (text.empty()) return {};
  Forced forced;
  const std::string name = text.substr(0, text.find('/'));
  const auto* known = std::find(std::begin(kStrategyNames), std::end(kStrategyNames), name);
  if (known != std::end(kStrategyNames)) forced.strategy = static_cast<Strategy>(known - std::begin(kStrategyNames));
  if (name.size() < text.size()) {
    const std::string tiles = text.substr(name.size() + 1);
    forced.batch_tiles = tiles == "1" ? 1 : tiles == "2" ? 2 : tiles == "4" ? 4 : tiles == "8" ? 8 : 0;
    if (!forced.batch_tiles) forced.strategy = {};
  }
  if (forced.strategy) return forced;
  throw std::invalid_argument("strategy: expected 'block', 'cluster', 'grid' or 'step', got '" + text + "'");
}

int sm_margin() {
  if (margin == kMarginUnset) margin = margin_of_environment();
  return margin;
}

void set_sm_margin(int wanted) { margin = wanted; }

int64_t planned_steps(int64_t T) {
  const int shift = std::max(0, static_cast<int>(std::bit_width(static_cast<uint64_t>(T))) - 2);
  return T >> shift << shift;
}

Plan make_plan(const Problem& asked, const Forced& forced) {
  Problem problem = asked;
  problem.shape.T = planned_steps(asked.shape.T);
  const auto wanted = [&](Strategy one) { return !forced.strategy || *forced.strategy == one; };
  const TileSizes& sizes = tile_sizes(problem.arithmetic);
  if (forced.batch_tiles > (forced.strategy == Strategy::kStep ? sizes.most_step_tiles : sizes.most_batch_tiles))
    throw std::runtime_error("strategy: no kernel has so many tiles of the batch");
  Possible possible;
  std::vector<std::pair<Strategy, std::string>> refused;
  bool by_refusal = false;
  Search search(problem, forced);
  for (const auto& [one, exchange] : kSequenceStrategies) {
    if (!wanted(one)) continue;
    std::string why;
    if (const std::optional<Choice> choice = search.best(exchange, why)) {
      possible.emplace_back(sequence_plan(problem, one, *choice), choice->time);
    } else {
      by_refusal = by_refusal || search.was_refused();
      refused.emplace_back(one, why);
    }
  }
  if (wanted(Strategy::kStep)) {
    const Plan plan = step_plan(problem, forced);
    if (std::string why = refusal(problem, forced, Strategy::kStep, plan.batch_tiles); !why.empty()) {
      by_refusal = true;
      refused.emplace_back(Strategy::kStep, why);
    } else {
      possible.emplace_back(plan, plan.microseconds * problem.shape.T);
    }
  }
  if (possible.empty()) {
    std::string text = "strategy: " + (forced.strategy ? "'" + std::string(name_of(*forced.strategy)) + "'" : "none");
    for (const auto& [each, why] : refused)
      text += (&why == &refused[0].second ? (forced.strategy ? " cannot run this: " : " can run this: ") : "; ") +
              (forced.strategy ? "" : std::string(name_of(each)) + ": ") + why;
    if (by_refusal) throw RefusedError(text);
    throw std::runtime_error(text);
  }
  if (const MeasuredTimes* measured = nearest(problem)) use_measured(possible, *measured, problem.shape.T);
  Plan plan = fastest(possible);
  for (const auto& [other, time] : possible) {
    if (other.strategy != plan.strategy) refused.emplace_back(other.strategy, slower(other, plan));
  }
  plan.refused = refused;
  return plan;
}

}  // namespace lstm_ext::cuda
