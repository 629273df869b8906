#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <iterator>
#include <optional>
#include <stdexcept>

namespace lstm_ext::cuda {
namespace {

// Clocks and bytes of an H100; assumed, until they are measured. COST_MODEL.md says what each stands for.
constexpr double kSyncClocks = 40, kProductClocks = 150, kEpilogueClocks = 700, kEpilogueItemClocks = 90;
constexpr double kClusterClocks = 700, kGridClocks = 1500;
constexpr double kSharedBytesPerClock = 128, kL2BytesPerClock = 3000, kL2BytesPerClockOfSm = 48;
constexpr double kLaunchMicroseconds = 2.5, kLoadClocksPerNumber = 0.6;
constexpr double kGapMicroseconds = 1.2, kOverlapMicroseconds = 0.6;  // between launches
constexpr double kStepStartClocks = 1000, kStageClocks = 300, kClusterSyncClocks = 350, kClusterBytesPerClock = 32;
constexpr int kMostClusterBlocksLog2 = 3, kMostStepSequences = 128;

constexpr int64_t kTileBytes = 512;  // of a tile of weights: 16 bytes in each of 32 lanes

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

// Lays a block's shared memory out, one thing after the other, each aligned for reads of 16 bytes. What is far too
// large stays an int that no device has room for.
struct SharedMemory {
  int64_t used = 0;
  int take(int64_t bytes) {
    const int64_t offset = used;
    used += round_up(bytes, 16);
    return static_cast<int>(std::min<int64_t>(offset, INT32_MAX));
  }
};

// What follows from a candidate: its layout, and by COST_MODEL.md its time.
class Planner {
 public:
  explicit Planner(const Problem& problem) : problem_(problem), sizes_(tile_sizes(problem.arithmetic)) {}

  // How many of `count` units a rank has. A word that is sent holds two of the half types.
  int units_of_rank(int64_t count, int ranks) const {
    const int64_t each = ceil_div(count, ranks);
    return static_cast<int>(ranks > 1 && sizes_.on_chip_bytes == 2 ? round_up(each, 2) : each);
  }

  Layout layout(const Candidate& candidate) const {
    const auto [T, B, I, H, P, projected] = problem_.shape;
    const int U = units_of_rank(H, candidate.ranks), p = projected ? units_of_rank(P, candidate.ranks) : U;
    const Slices gates{U, 4, static_cast<int>(H), H};
    const Slices units{U, 1, static_cast<int>(H), 0};
    const Slices h{p, 1, static_cast<int>(P), 0};
    Layout layout{};
    layout.exchange = candidate.exchange;
    layout.ranks = candidate.ranks;
    layout.team_batch = candidate.team_batch;
    layout.num_products = projected ? 2 : 1;
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
      numbers += double(layout.product[n].row_tiles) * sizes_.rows * layout.product[n].k_tiles * sizes_.columns;
    return microseconds(numbers * kLoadClocksPerNumber);
  }

 private:
  // Tiles of weights, and which of them each warp has. The registers are the first product's.
  void cut_into_tiles(ProductLayout& product, int register_steps, int ranks) const {
    product.row_tiles = static_cast<int>(ceil_div(product.rows.per_rank(), sizes_.rows));
    product.k_tiles = static_cast<int>(ceil_div(int64_t{ranks} * product.columns.per_rank(), sizes_.columns));
    const int pairs = static_cast<int>(ceil_div(product.row_tiles, sizes_.row_tiles));
    product.warps_m = 1;
    while (product.warps_m * 2 <= std::min(pairs, kWarps)) product.warps_m *= 2;
    const int64_t steps = ceil_div(pairs, product.warps_m) * ceil_div(product.k_tiles, kWarps / product.warps_m);
    product.shared_steps = static_cast<int>(std::max<int64_t>(0, steps - register_steps));
  }

  // The operands and tiles of each product are its own; partial sums and outbox serve both, one after the other.
  void place_in_memory(Layout& layout, const Candidate& candidate) const {
    const int64_t sequences = candidate.batch_tiles * kBatchColumns;
    const bool cluster = candidate.exchange == Exchange::kCluster, alone = candidate.exchange == Exchange::kBlock;
    SharedMemory memory;
    int64_t partial = 0, outbox = 0;
    for (int n = 0; n < layout.num_products; ++n) {
      const int rows = layout.product[n].row_tiles * sizes_.rows;
      layout.partial_stride = std::max(layout.partial_stride, rows + kPartialPadding);
    }
    for (int n = 0; n < layout.num_products; ++n) {
      ProductLayout& product = layout.product[n];
      const int64_t splits = kWarps / product.warps_m;
      product.operand_bytes =
          static_cast<int>(int64_t{product.k_tiles} * sizes_.columns * sequences * sizes_.on_chip_bytes);
      product.tiles_offset = memory.take(int64_t{kWarps} * product.shared_steps * sizes_.row_tiles * kTileBytes);
      product.operand_offset = memory.take(int64_t{cluster ? 2 : 1} * product.operand_bytes);
      product.row_words = static_cast<int>(ceil_div(int64_t{product.columns.per_rank()} * sizes_.on_chip_bytes, 4));
      product.words_offset = layout.exchange_words;
      layout.exchange_words += int64_t{2} * layout.team_batch * layout.ranks * product.row_words;
      partial = std::max(partial, splits * sequences * layout.partial_stride * sizes_.sum_bytes);
      outbox = std::max(outbox, sequences * product.row_words * 4);
    }
    const int units =
        problem_.backward ? layout.product[layout.num_products - 1].rows.width : layout.product[0].rows.width;
    layout.partial_offset = memory.take(partial);
    layout.outbox_offset = memory.take(alone ? 0 : outbox);
    layout.state_offset = memory.take(sequences * units * sizes_.sum_bytes);
    layout.moments_offset = memory.take(2 * sequences * static_cast<int64_t>(sizeof(Moment)));
    layout.barriers_offset = memory.take(4 * sizeof(uint64_t));
    layout.shared_bytes = static_cast<int>(std::min<int64_t>(memory.used, INT32_MAX));
  }

  // Of one product of a step with what comes before and after it: an exchange, and the pointwise part.
  double product_clocks(const Layout& layout, const ProductLayout& product) const {
    const double rows = double(product.row_tiles) * sizes_.rows, columns = double(product.k_tiles) * sizes_.columns;
    const double batch = round_up(layout.team_batch, kBatchColumns);
    const double fma = rows * columns * batch / fma_per_clock(problem_.arithmetic);
    const double from_shared =
        double(kWarps) * product.shared_steps * sizes_.row_tiles * kTileBytes / kSharedBytesPerClock;
    const double items = std::ceil(double(product.rows.width) * layout.team_batch / kThreads);
    double clocks =
        kProductClocks + std::max(fma, from_shared) + 2 * kSyncClocks + kEpilogueClocks + items * kEpilogueItemClocks;
    const double words = double(layout.team_batch) * layout.ranks * product.row_words;
    if (layout.exchange == Exchange::kCluster) clocks += kClusterClocks + words * 4 / 32;
    if (layout.exchange == Exchange::kGrid) {
      const double blocks = double(layout.ranks) * std::max(layout.teams, 1) * problem_.directions;
      clocks += kGridClocks + std::max(words * 8 / kL2BytesPerClockOfSm, words * 8 * blocks / kL2BytesPerClock);
    }
    return clocks;
  }

  const Problem& problem_;
  const TileSizes& sizes_;
};

struct Choice {
  Candidate candidate;
  Layout layout;
  double time = INFINITY;  // of the whole layer
  double per_step = 0;     // of all tiles of the batch
};

// Tries all sizes of a team with one exchange.
//
//   batch tiles 1, 2, 4   x   ranks   kBlock: 1    kCluster: 2, 4, 8    kGrid: 2 .. all multiprocessors of a direction
//
// More ranks have fewer weights each, and more of them to hear from. More batch tiles need more registers for sums, and
// let a team take more sequences at a time, which it does only where there would be more teams than can run at once.
class Search {
 public:
  explicit Search(const Problem& problem) : problem_(problem), planner_(problem) {}

  // The fastest way with this exchange, or why there is none.
  std::optional<Choice> best(Exchange exchange, std::string& why) {
    best_ = {};
    fits_ = false;
    least_shared_ = INT64_MAX;
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
    for (int tiles = 1; tiles <= tile_sizes(problem_.arithmetic).most_batch_tiles; tiles *= 2)
      for (int ranks = exchange == Exchange::kBlock ? 1 : 2; ranks <= most;
           ranks = exchange == Exchange::kCluster ? ranks * 2 : ranks + 1)
        try_ranks(exchange, ranks, tiles);
    if (std::isinf(best_.time)) {
      why = fits_ ? "the device cannot run a team of blocks with so much shared memory at a time"
            : least_shared_ < INT64_MAX
                ? "needs at least " + std::to_string(least_shared_) + " bytes of shared memory in a block, of " +
                      std::to_string(problem_.device.shared_per_block)
                : "no room for a team of blocks";
      return {};
    }
    return best_;
  }

 private:
  // 0 where the device cannot do it at all.
  int most_ranks(Exchange exchange) const {
    const int sms = problem_.device.sms / problem_.directions;
    if (exchange == Exchange::kBlock) return 1;
    if (exchange == Exchange::kCluster) return problem_.device.compute_capability >= 90 ? 8 : 0;
    return problem_.device.cooperative && sms >= 2 ? sms : 0;
  }

  // How many teams of each direction can run at a time; 0 if not one can. More of them wait, but for those of kGrid,
  // which must all run.
  int64_t resident_teams(const Candidate& c, const Layout& layout) const {
    const int cluster = c.exchange == Exchange::kCluster ? c.ranks : 1;
    const int resident = problem_.resident_blocks(problem_.arithmetic, problem_.backward, c.batch_tiles, cluster,
                                                  layout.shared_bytes, problem_.device.sms);
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
    c.team_batch = static_cast<int>(std::clamp<int64_t>(ceil_div(B, resident), 1, c.team_batch));
    layout = planner_.layout(c);
    const int64_t batches = std::max<int64_t>(1, ceil_div(B, c.team_batch));
    layout.teams = static_cast<int>(std::min(batches, resident));
    const double per_step = planner_.step_time(layout) * ceil_div(batches, layout.teams);
    const double time = per_step * problem_.shape.T + planner_.load_time(layout);
    if (time < best_.time) best_ = {c, layout, time, per_step};
  }

  const Problem& problem_;
  Planner planner_;
  Choice best_;
  bool fits_ = false;                 // some candidate's block fits into a multiprocessor
  int64_t least_shared_ = INT64_MAX;  // that any candidate's block needs
};

constexpr std::pair<Strategy, Exchange> kSequenceStrategies[] = {
    {Strategy::kBlock, Exchange::kBlock}, {Strategy::kCluster, Exchange::kCluster}, {Strategy::kGrid, Exchange::kGrid}};

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
  for (LaunchConfig& config : plan.config) {
    config.grid_y = problem.directions;
    config.threads = kThreads;
  }
  return plan;
}

// All ways to cut a launch that the device can run.
//
//   sequences of a warp 8, 16, .. 64   x   warps along the rows 1 .. 8   x   along the batch   x   blocks along k 1 ..
//   8
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

// The fastest way to cut the launches of a step; all have the same batch tiles, as they are of one kernel.
Plan step_plan(const Problem& problem) {
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
  for (int batch_tiles = 1; batch_tiles <= sizes.most_step_tiles; batch_tiles *= 2) {
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
    plan.batch_tiles = batch_tiles;
    for (int n = 0; n < plan.num_parts; ++n) {
      plan.part[n] = best[n].part;
      plan.config[n] = best[n].config;
    }
  }
  if (std::isinf(plan.microseconds)) throw std::runtime_error("x: expected a smaller batch for a launch");
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

std::string slower(double microseconds, const Plan& chosen) {
  char text[96];
  std::snprintf(text, sizeof(text), "predicted %.2f us a step, %s %.2f", microseconds, name_of(chosen.strategy),
                chosen.microseconds);
  return text;
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

std::optional<Strategy> strategy_named(const std::string& name) {
  if (name.empty()) return {};
  const auto* known = std::find(std::begin(kStrategyNames), std::end(kStrategyNames), name);
  if (known != std::end(kStrategyNames)) return static_cast<Strategy>(known - std::begin(kStrategyNames));
  throw std::invalid_argument("strategy: expected 'block', 'cluster', 'grid' or 'step', got '" + name + "'");
}

Plan make_plan(const Problem& problem, std::optional<Strategy> strategy) {
  const auto wanted = [&](Strategy one) { return !strategy || *strategy == one; };
  std::vector<std::pair<Plan, double>> possible;  // and the time of the whole layer
  std::vector<std::pair<Strategy, std::string>> refused;
  Search search(problem);
  for (const auto& [one, exchange] : kSequenceStrategies) {
    if (!wanted(one)) continue;
    std::string why;
    if (const std::optional<Choice> choice = search.best(exchange, why)) {
      possible.emplace_back(sequence_plan(problem, one, *choice), choice->time);
    } else {
      refused.emplace_back(one, why);
    }
  }
  if (wanted(Strategy::kStep)) {
    const Plan plan = step_plan(problem);
    possible.emplace_back(plan, plan.microseconds * problem.shape.T);
  }
  const Plan* chosen = nullptr;
  double chosen_time = INFINITY;
  for (const auto& [plan, time] : possible) {
    if (time < chosen_time) {
      chosen = &plan;
      chosen_time = time;
    }
  }
  if (!chosen) {
    throw std::runtime_error("strategy: '" + std::string(strategy ? name_of(*strategy) : "") +
                             "' cannot run this: " + refused[0].second);
  }
  Plan plan = *chosen;
  for (const auto& [other, time] : possible) {
    if (other.strategy != plan.strategy) refused.emplace_back(other.strategy, slower(other.microseconds, plan));
  }
  plan.refused = refused;
  return plan;
}

}  // namespace lstm_ext::cuda
