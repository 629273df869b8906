// All steps in one launch: the size of a team, its layout, and by COST_MODEL.md its time.
#include <algorithm>
#include <cmath>
#include <iterator>

#include "plan_search.h"

namespace lstm_ext::cuda {
namespace {

constexpr double kSyncClocks = 40, kProductClocks = 115, kProductSlowdown = 2.2;
constexpr double kForwardClocks = 2230, kBackwardClocks = 3140, kItemClocks = 95;  // around the product
constexpr double kClusterClocks = 890, kClusterBytesPerClock = 32, kGridClocks = 930;
constexpr double kMailBytesPerClock = 3500, kMailBytesPerClockBackward = 630;  // of all blocks together
constexpr double kLoadClocksPerNumber = 0.6;

// Of a cell that normalises, in each of so many exchanges of a step: of the part of a row that a block has, and the
// items once more; until numbers of all ranks have come and are added up, of which a lane has every 32nd rank.
constexpr int kRowExchanges = 2, kRowExchangesBackward = 3;
constexpr double kMomentsClocks = 1380, kMomentsClocksBackward = 1680;
constexpr double kMomentsClusterClocks = 550, kMomentsGridClocks = 1800, kMoreRanksClocks = 250;

constexpr int64_t kTileBytes = 512;  // of a tile of weights: 16 bytes in each of 32 lanes

constexpr int kMostClusterBlocks = 16;  // where the device allows more than the portable 8

// How many k tiles of a group of rows a warp may have in registers together: what product.cuh has straight code for.
constexpr int kRuns[] = {1, 2, 4, 8, 12, 16};

// Places in a layout are ints, and weights of so many units are on no chip.
constexpr int64_t kMostUnitsOnChip = 1 << 15;

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
    double clocks = cell_step_clocks(problem_) + (problem_.normalises() ? rows_clocks(layout) : 0);
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
      const int64_t part = batch * product.rows.width;  // numbers that one rank sends another
      int64_t parts = backward && cluster ? layout.ranks : 0;
      if (backward && candidate.exchange == Exchange::kGrid) {
        product.mail_pieces = Divisor(as_int(part * sum_bytes / 16));
        const int64_t of_threads = std::max(kThreads / product.mail_pieces.value, 1);
        product.mail_groups = as_int(std::min<int64_t>(of_threads, ceil_div(layout.ranks, kMailInFlight)));
        parts = product.mail_groups;
      }
      product.inbox_bytes = as_int(parts * part * sum_bytes);
      product.inbox_offset = memory.take(int64_t{cluster ? 2 : 1} * product.inbox_bytes);
      product.mail_offset = layout.exchange_bytes;
      layout.exchange_bytes += 2 * mail_bytes(layout, product);
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
    const int cell_rows = problem_.normalises() ? kNormCellRows : kCellRows;
    const int sequence = 4 * layout.gate_row + cell_rows * layout.cell_row + layout.h_row;
    layout.inputs_bytes = as_int(batch * sequence);
    layout.gate_pieces = Divisor(layout.gate_row / 16);
    layout.input_pieces = Divisor(sequence / 16);
    layout.inputs_offset = memory.take(int64_t{3} * layout.inputs_bytes);  // as sequence.cuh takes turns
    layout.state_offset = memory.take(batch * units * sum_bytes);
    layout.cells_offset = memory.take(backward || problem_.normalises() ? batch * units * sum_bytes : 0);
    layout.moments_offset = memory.take(kMoments * batch * static_cast<int64_t>(sizeof(Moment)));
    layout.rows_offset = memory.take(int64_t{kMoments} * batch * kRowsBytes);
    layout.barriers_offset = memory.take(6 * sizeof(uint64_t));
    if (problem_.cell) {
      const Share& h = backward ? layout.product[0].rows : layout.product[0].columns;
      layout.draw_keys_offset =
          memory.take(problem_.cell->draws > 0 ? kMomentSteps * batch * static_cast<int64_t>(sizeof(DrawKeys)) : 0);
      layout.peephole_offset = memory.take(units * 4 * sum_bytes);
      layout.h_state_offset =
          memory.take(problem_.cell->keeps_h ? batch * h.items.value * item_units() * sum_bytes : 0);
    }
    if (problem_.normalises()) {
      layout.norm_offset = memory.take(units * kNormUnitNumbers * sum_bytes);
      layout.norm_known_offset = memory.take(backward ? batch * units * kNormKnownNumbers * sum_bytes : 0);
      const int64_t rows = 2 * layout.ranks * batch * kRowNumbers * sum_bytes;
      layout.row_inbox_offset = memory.take(cluster ? rows : 0);
      layout.row_mail_offset = layout.exchange_bytes;
      if (candidate.exchange == Exchange::kGrid) layout.exchange_bytes += rows;
    }
    layout.shared_bytes = as_int(memory.used);
  }

  // That a team needs for one exchange of a product.
  int64_t mail_bytes(const Layout& layout, const ProductLayout& product) const {
    if (layout.exchange != Exchange::kGrid) return 0;
    if (!problem_.backward) {
      const int64_t row_bytes = int64_t{sizes_.columns} * sizes_.on_chip_bytes;
      return 2 * (int64_t{product.k_tiles} << layout.log_rows) * row_bytes;
    }
    return int64_t{layout.ranks} * layout.ranks * layout.team_batch * product.rows.width * sizes_.sum_bytes;
  }

  // Of a cell that normalises: what ranks tell each other of their rows.
  double rows_clocks(const Layout& layout) const {
    const int more_items = (layout.units.value - 1) / 32, more_ranks = (layout.ranks - 1) / 32;  // than lanes
    double clocks =
        (problem_.backward ? kMomentsClocksBackward : kMomentsClocks) + more_items * (kItemClocks + kCellClocks);
    if (layout.exchange != Exchange::kBlock) {
      const double bytes = double(layout.team_batch) * layout.ranks * kRowNumbers * sizes_.sum_bytes;
      clocks += layout.exchange == Exchange::kGrid ? kMomentsGridClocks + bytes / kL2BytesPerClockOfSm
                                                   : kMomentsClusterClocks + bytes / kClusterBytesPerClock;
      clocks += more_ranks * kMoreRanksClocks;
    }
    return clocks * (problem_.backward ? kRowExchangesBackward : kRowExchanges);
  }

  // Of one product of a step with what comes before and after it: an exchange, and the pointwise part.
  double product_clocks(const Layout& layout, const ProductLayout& product) const {
    const double rows = double(product.row_groups) * kGroupRows, columns = double(product.k_tiles) * sizes_.columns;
    const double batch = round_up(layout.team_batch, kBatchColumns);
    const double fma = kProductSlowdown * rows * columns * batch / fma_per_clock(problem_.arithmetic);
    const double from_shared =
        double(kWarps) * product.shared_steps * sizes_.row_tiles * kTileBytes / kSharedBytesPerClock;
    const double items = std::ceil(double(product.rows.items.value) * layout.team_batch / kThreads);
    double clocks = kProductClocks + std::max(fma, from_shared) + 2 * kSyncClocks +
                    (problem_.backward ? kBackwardClocks : kForwardClocks) + items * kItemClocks;
    if (problem_.cell) clocks += items * (kCellClocks + problem_.cell->draws * kDrawClocks);
    // What a block receives.
    const Share& own = problem_.backward ? product.rows : product.columns;
    const int number_bytes = problem_.backward ? sizes_.sum_bytes : sizes_.on_chip_bytes;
    const double bytes = double(layout.team_batch) * layout.ranks * own.per_rank() * number_bytes;
    if (layout.exchange == Exchange::kCluster) clocks += kClusterClocks + bytes / kClusterBytesPerClock;
    if (layout.exchange == Exchange::kGrid) {
      const double blocks = double(layout.ranks) * std::max(layout.teams, 1) * problem_.directions;
      const double rate = problem_.backward ? kMailBytesPerClockBackward : kMailBytesPerClock;
      const double mail = problem_.backward ? bytes : 2 * bytes;
      clocks += kGridClocks + std::max(mail / kL2BytesPerClockOfSm, mail * blocks / rate);
    }
    return clocks;
  }

  const Problem& problem_;
  const TileSizes& sizes_;
};

// Multiprocessors for launches for all T.
int usable_sms(const Problem& problem) { return std::max(1, problem.device.sms - problem.sm_margin); }

struct Choice {
  Candidate candidate;
  Layout layout;
  double time = INFINITY;  // of the whole layer
  double per_step = 0;     // of all tiles of the batch
};

// Tries all sizes of a team that exchanges in one way, once.
//
//   batch tiles 1, 2, 4   x   ranks   kBlock: 1    kCluster: 2, 4, 8, 16    kGrid: 2 .. all multiprocessors of a
//   direction
//
// More ranks have fewer weights each, and more of them to hear from. More batch tiles need more registers for sums, and
// let a team take more sequences at a time, which it does only where there would be more teams than can run at once.
class Search {
 public:
  Search(const Problem& problem, const Forced& forced, Strategy strategy)
      : problem_(problem), forced_(forced), strategy_(strategy), planner_(problem) {}

  // The fastest way, or why there is none.
  std::optional<Choice> best(std::string& why) {
    const Exchange exchange = exchange_of(strategy_);
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
    for (int tiles = 1; has_tiles(problem_, false, tiles); tiles *= 2) {
      if (forced_.batch_tiles && tiles != forced_.batch_tiles) continue;
      if (std::string refused = refusal(problem_, forced_, strategy_, tiles); !refused.empty()) {
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

  // Whether it left a kernel out that it was told not to run.
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
    int resident = problem_.resident_blocks(problem_, strategy_, c.batch_tiles, cluster, layout.shared_bytes);
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
  const Strategy strategy_;
  Planner planner_;
  Choice best_;
  bool was_refused_ = false;          // some kernel
  bool fits_ = false;                 // some candidate's block fits into a multiprocessor
  int64_t least_shared_ = INT64_MAX;  // that any candidate's block needs
};

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
  if (strategy == Strategy::kGrid) plan.workspace_bytes = problem.directions * layout.teams * layout.exchange_bytes;
  return plan;
}

}  // namespace

Found find_sequence_plan(const Problem& problem, const Forced& forced, Strategy strategy) {
  Search search(problem, forced, strategy);
  Found found;
  if (const std::optional<Choice> choice = search.best(found.why)) {
    found.plan = sequence_plan(problem, strategy, *choice);
    found.time = choice->time;
  }
  found.was_refused = !found.plan && search.was_refused();
  return found;
}

}  // namespace lstm_ext::cuda
