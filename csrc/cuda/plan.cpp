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
constexpr double kSyncClocks = 40, kProductClocks = 150, kEpilogueClocks = 700, kEpilogueItemClocks = 90;
constexpr double kClusterClocks = 700, kGridClocks = 1500;
constexpr double kSharedBytesPerClock = 128, kL2BytesPerClock = 3000, kL2BytesPerClockOfSm = 48;
constexpr double kLaunchMicroseconds = 2.5, kLoadClocksPerNumber = 0.6;

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

  // Microseconds of one step of the whole batch, if it is a launch.
  double launch_per_step_time() const {
    const double numbers = double(problem_.shape.H) * problem_.shape.P * 4 +
                           (problem_.shape.projected ? double(problem_.shape.H) * problem_.shape.P : 0);
    const double tiles = std::ceil(problem_.shape.B / (8.0 * sizes_.most_batch_tiles));
    const double bytes = numbers * sizes_.number_bytes * problem_.directions * tiles;
    const double product =
        numbers * problem_.shape.B * problem_.directions / fma_per_clock(problem_.arithmetic) / problem_.device.sms;
    const int launches = problem_.shape.projected ? 2 : 1;
    return launches * (kLaunchMicroseconds + microseconds(kEpilogueClocks)) +
           microseconds(std::max(bytes / kL2BytesPerClock, product));
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
//   batch tiles 1, 2, 4   x   ranks   kBlock: 1    kCluster: 2, 4, 8    kGrid: 2 .. all multiprocessors of a direction
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
    if (exchange == Exchange::kCluster) return problem_.device.compute_capability >= 90 ? 8 : 0;
    return problem_.device.cooperative && sms >= 2 ? sms : 0;
  }

  // How many teams of each direction can run at a time; 0 if not one can. More of them wait, but for those of kGrid,
  // which must all run.
  int64_t resident_teams(const Candidate& c, const Layout& layout) const {
    const int cluster = c.exchange == Exchange::kCluster ? c.ranks : 1;
    int resident = problem_.resident_blocks(problem_.arithmetic, problem_.backward, c.batch_tiles, cluster,
                                            layout.shared_bytes, problem_.device.sms);
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

// One product with a launch of its own.
StepPart step_part(const Problem& problem, Product product, int64_t batches) {
  const int64_t H = problem.shape.H;
  const bool gates = product == Product::kRecurrent && !problem.backward;
  const bool hidden = product == Product::kProjection && problem.backward;
  const int64_t units = gates || hidden ? H : problem.shape.P;
  const int groups = gates ? 4 : 1;
  StepPart part{};
  part.product = product;
  // As many rows in a block as leave a block for every multiprocessor.
  for (part.warps_m = 8; part.warps_m > 1; part.warps_m /= 2) {
    const int64_t blocks = ceil_div(units * groups, part.warps_m * kStepRows) * batches * problem.directions;
    if (blocks >= problem.device.sms) break;
  }
  const int width = part.warps_m * kStepRows / groups;
  part.rows = {width, groups, static_cast<int>(units), H};
  part.row_blocks = static_cast<int>(ceil_div(units, width));
  return part;
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

// As few batch tiles as hold the batch, up to the most: each tile of the batch reads all weights again.
Plan step_plan(const Problem& problem, const Forced& forced) {
  const SequenceShape& shape = problem.shape;
  if (std::max(shape.H, shape.P) > kMostUnits) {
    throw std::runtime_error("weights: expected at most 2**28 units on a GPU, got H = " + std::to_string(shape.H) +
                             ", P = " + std::to_string(shape.P));
  }
  const TileSizes& sizes = tile_sizes(problem.arithmetic);
  Plan plan = new_plan(problem, Strategy::kStep);
  plan.batch_tiles = 1;
  while (plan.batch_tiles < sizes.most_batch_tiles && plan.batch_tiles * kBatchColumns < shape.B) plan.batch_tiles *= 2;
  if (forced.batch_tiles) plan.batch_tiles = forced.batch_tiles;
  while (plan.batch_tiles > 1 && !refusal(problem, forced, Strategy::kStep, plan.batch_tiles).empty())
    plan.batch_tiles /= 2;
  const int sequences = plan.batch_tiles * kBatchColumns;
  const int64_t batches = std::max<int64_t>(1, ceil_div(shape.B, sequences));
  plan.num_parts = shape.projected ? 2 : 1;
  for (int n = 0; n < plan.num_parts; ++n) {
    const StepPart& part = plan.part[n] = step_part(problem, static_cast<Product>(n), batches);
    if (part.row_blocks * batches > kMostBlocks) throw std::runtime_error("x: expected a smaller batch for a launch");
    plan.config[n].grid_x = static_cast<int>(part.row_blocks * batches);
    plan.config[n].shared_bytes = step_shared_bytes(sequences, part.warps_m, sizes.sum_bytes);
  }
  plan.microseconds = Planner(problem).launch_per_step_time();
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
    forced.batch_tiles = tiles == "1" ? 1 : tiles == "2" ? 2 : tiles == "4" ? 4 : 0;
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
  if (forced.batch_tiles > tile_sizes(problem.arithmetic).most_batch_tiles)
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
