#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <optional>
#include <stdexcept>

namespace lstm_ext::cuda {
namespace {

// Clocks and bytes of an H100; assumed, until they are measured. COST_MODEL.md says what each stands for.
constexpr double kSyncClocks = 40, kProductClocks = 150, kEpilogueClocks = 700, kEpilogueItemClocks = 90;
constexpr double kClusterClocks = 700, kGridClocks = 1500;
constexpr double kSharedBytesPerClock = 128, kL2BytesPerClock = 3000, kL2BytesPerClockOfSm = 48;
constexpr double kLaunchMicroseconds = 2.5, kLoadClocksPerNumber = 0.6;

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

struct Candidate {
  Exchange exchange;
  int ranks, column_tiles, batch_tile;
};

// Lays a block's shared memory out, one thing after the other.
struct SharedMemory {
  int64_t used = 0;
  int take(int64_t bytes) {
    const int64_t offset = used;
    used += round_up(bytes, 16);
    return static_cast<int>(std::min<int64_t>(offset, INT32_MAX));
  }
};

class Planner {
 public:
  explicit Planner(const Question& question) : q_(question), sizes_(tile_sizes(question.arithmetic)) {}

  // What a rank has of `count` units. A word that is sent holds two of the half types.
  int share(int64_t count, int ranks) const {
    const int64_t each = ceil_div(count, ranks);
    return static_cast<int>(ranks > 1 && sizes_.on_chip_bytes == 2 ? round_up(each, 2) : each);
  }

  Spread spread(const Candidate& candidate) const {
    const auto [T, B, I, H, P, projected] = q_.shape;
    const int U = share(H, candidate.ranks), p = projected ? share(P, candidate.ranks) : U;
    const int hidden = static_cast<int>(H), width = static_cast<int>(P);
    const SharedOut gates{U, 4, hidden, H}, units{U, 1, hidden, 0}, h{p, 1, width, 0};
    Spread spread{};
    spread.exchange = candidate.exchange;
    spread.ranks = candidate.ranks;
    spread.batch_tile = candidate.batch_tile;
    spread.num_stages = projected ? 2 : 1;
    spread.stage[0].rows = q_.backward ? h : gates;
    spread.stage[0].columns = q_.backward ? gates : h;
    spread.stage[1].rows = q_.backward ? units : h;
    spread.stage[1].columns = q_.backward ? h : units;
    lay_out(spread, candidate);
    return spread;
  }

  // Microseconds of one step of one tile of the batch.
  double step_time(const Spread& spread) const {
    double clocks = 0;
    for (int n = 0; n < spread.num_stages; ++n) clocks += stage_clocks(spread, spread.stage[n]);
    return microseconds(clocks);
  }

  double microseconds(double clocks) const { return clocks * 1e3 / q_.device.clock_khz; }

  // Until a block has its weights.
  double load_time(const Spread& spread) const {
    double numbers = 0;
    for (int n = 0; n < spread.num_stages; ++n)
      numbers += double(spread.stage[n].row_tiles) * sizes_.rows * spread.stage[n].column_tiles * sizes_.columns;
    return microseconds(numbers * kLoadClocksPerNumber);
  }

  double launch_per_step_time() const {
    const double numbers =
        double(q_.shape.H) * q_.shape.P * 4 + (q_.shape.projected ? double(q_.shape.H) * q_.shape.P : 0);
    const double tiles = std::ceil(q_.shape.B / (8.0 * sizes_.most_column_tiles));
    const double bytes = numbers * sizes_.number_bytes * q_.directions * tiles;
    const double product = numbers * q_.shape.B * q_.directions / fma_per_clock(q_.arithmetic) / q_.device.sms;
    const int launches = q_.shape.projected ? 2 : 1;
    return launches * (kLaunchMicroseconds + microseconds(kEpilogueClocks)) +
           microseconds(std::max(bytes / kL2BytesPerClock, product));
  }

 private:
  void lay_out(Spread& spread, const Candidate& candidate) const {
    const int64_t columns = candidate.column_tiles * kColumns;
    const bool cluster = candidate.exchange == Exchange::kCluster, alone = candidate.exchange == Exchange::kBlock;
    SharedMemory memory;
    int64_t partial = 0, outbox = 0;
    for (int n = 0; n < spread.num_stages; ++n) {
      share_out(spread.stage[n], n == 0 ? sizes_.register_steps : 0, spread.ranks);
      const int rows = spread.stage[n].row_tiles * sizes_.rows;
      spread.partial_stride = std::max(spread.partial_stride, rows + kPartialPadding);
    }
    for (int n = 0; n < spread.num_stages; ++n) {
      Stage& stage = spread.stage[n];
      const int64_t slices = kWarps / stage.warps_m;
      stage.operand_bytes =
          static_cast<int>(int64_t{stage.column_tiles} * sizes_.columns * columns * sizes_.on_chip_bytes);
      stage.tiles_offset = memory.take(int64_t{kWarps} * stage.shared_steps * sizes_.row_tiles * 512);
      stage.operand_offset = memory.take(int64_t{cluster ? 2 : 1} * stage.operand_bytes);
      stage.row_words = static_cast<int>(ceil_div(int64_t{stage.columns.each()} * sizes_.on_chip_bytes, 4));
      stage.words_offset = spread.exchange_words;
      spread.exchange_words += int64_t{2} * spread.batch_tile * spread.ranks * stage.row_words;
      partial = std::max(partial, slices * columns * spread.partial_stride * sizes_.sum_bytes);
      outbox = std::max(outbox, columns * stage.row_words * 4);
    }
    const int units = q_.backward ? spread.stage[spread.num_stages - 1].rows.width : spread.stage[0].rows.width;
    spread.partial_offset = memory.take(partial);
    spread.outbox_offset = memory.take(alone ? 0 : outbox);
    spread.state_offset = memory.take(columns * units * sizes_.sum_bytes);
    spread.rows_offset = memory.take(2 * columns * static_cast<int64_t>(sizeof(Row)));
    spread.barriers_offset = memory.take(4 * sizeof(uint64_t));
    spread.shared_bytes = static_cast<int>(std::min<int64_t>(memory.used, INT32_MAX));
  }

  void share_out(Stage& stage, int register_steps, int ranks) const {
    stage.row_tiles = static_cast<int>(ceil_div(stage.rows.each(), sizes_.rows));
    stage.column_tiles = static_cast<int>(ceil_div(int64_t{ranks} * stage.columns.each(), sizes_.columns));
    const int pairs = static_cast<int>(ceil_div(stage.row_tiles, sizes_.row_tiles));
    stage.warps_m = 1;
    while (stage.warps_m * 2 <= std::min(pairs, kWarps)) stage.warps_m *= 2;
    const int64_t steps = ceil_div(pairs, stage.warps_m) * ceil_div(stage.column_tiles, kWarps / stage.warps_m);
    stage.shared_steps = static_cast<int>(std::max<int64_t>(0, steps - register_steps));
  }

  double stage_clocks(const Spread& spread, const Stage& stage) const {
    const double rows = double(stage.row_tiles) * sizes_.rows, columns = double(stage.column_tiles) * sizes_.columns;
    const double batch = round_up(spread.batch_tile, kColumns);
    const double fma = rows * columns * batch / fma_per_clock(q_.arithmetic);
    const double from_shared = double(kWarps) * stage.shared_steps * sizes_.row_tiles * 512 / kSharedBytesPerClock;
    const double items = std::ceil(double(stage.rows.width) * spread.batch_tile / kThreads);
    double clocks =
        kProductClocks + std::max(fma, from_shared) + 2 * kSyncClocks + kEpilogueClocks + items * kEpilogueItemClocks;
    const double words = double(spread.batch_tile) * spread.ranks * stage.row_words;
    if (spread.exchange == Exchange::kCluster) clocks += kClusterClocks + words * 4 / 32;
    if (spread.exchange == Exchange::kGrid) {
      const double blocks = double(spread.ranks) * std::max(spread.teams, 1) * q_.directions;
      clocks += kGridClocks + std::max(words * 8 / kL2BytesPerClockOfSm, words * 8 * blocks / kL2BytesPerClock);
    }
    return clocks;
  }

  const Question& q_;
  const TileSizes& sizes_;
};

struct Choice {
  Candidate candidate;
  Spread spread;
  double time = INFINITY;  // of the whole layer
  double per_step = 0;     // of all tiles of the batch
};

class Search {
 public:
  explicit Search(const Question& question) : q_(question), planner_(question) {}

  // The fastest way with this exchange, or why there is none.
  std::optional<Choice> best(Exchange exchange, std::string& why) {
    best_ = {};
    fits_ = false;
    least_shared_ = INT64_MAX;
    const int most = most_ranks(exchange);
    if (most < 1) {
      why = exchange == Exchange::kCluster ? "no clusters before compute capability 9.0"
            : q_.device.cooperative        ? "too few multiprocessors"
                                           : "no cooperative launch";
      return {};
    }
    for (int tiles = 1; tiles <= tile_sizes(q_.arithmetic).most_column_tiles; tiles *= 2)
      for (int ranks = exchange == Exchange::kBlock ? 1 : 2; ranks <= most;
           ranks = exchange == Exchange::kCluster ? ranks * 2 : ranks + 1)
        try_ranks(exchange, ranks, tiles);
    if (std::isinf(best_.time)) {
      why = fits_ ? "the device cannot run a team of blocks with so much shared memory at a time"
            : least_shared_ < INT64_MAX
                ? "needs at least " + std::to_string(least_shared_) + " bytes of shared memory in a block, of " +
                      std::to_string(q_.device.shared_per_block)
                : "no room for a team of blocks";
      return {};
    }
    return best_;
  }

 private:
  int most_ranks(Exchange exchange) const {
    const int sms = q_.device.sms / q_.directions;
    if (exchange == Exchange::kBlock) return 1;
    if (exchange == Exchange::kCluster) return q_.device.compute_capability >= 90 ? 8 : 0;
    return q_.device.cooperative && sms >= 2 ? sms : 0;
  }

  // How many teams of each direction can run at a time; 0 if not one can. More of them wait, but for those of kGrid,
  // which must all run.
  int64_t room(const Candidate& c, const Spread& spread) const {
    const bool cluster = c.exchange == Exchange::kCluster;
    const int room =
        q_.room(q_.arithmetic, q_.backward, c.column_tiles, cluster ? c.ranks : 1, spread.shared_bytes, q_.device.sms);
    if (c.exchange == Exchange::kGrid) return room / q_.directions / c.ranks;
    return room == 0 ? 0 : std::max(1, room / q_.directions);
  }

  void try_ranks(Exchange exchange, int ranks, int tiles) {
    if (ranks > 2 && int64_t{ranks} > q_.shape.H) return;
    Candidate c{exchange, ranks, tiles, tiles * kColumns};
    Spread spread = planner_.spread(c);
    least_shared_ = std::min<int64_t>(least_shared_, spread.shared_bytes);
    if (spread.shared_bytes > q_.device.shared_per_block) return;
    fits_ = true;
    const int64_t B = q_.shape.B, room = this->room(c, spread);
    if (room == 0) return;
    // As few sequences in a team as the room allows.
    c.batch_tile = static_cast<int>(std::clamp<int64_t>(ceil_div(B, room), 1, c.batch_tile));
    spread = planner_.spread(c);
    const int64_t batch_tiles = std::max<int64_t>(1, ceil_div(B, c.batch_tile));
    spread.teams = static_cast<int>(std::min(batch_tiles, room));
    const double per_step = planner_.step_time(spread) * ceil_div(batch_tiles, spread.teams);
    const double time = per_step * q_.shape.T + planner_.load_time(spread);
    if (time < best_.time) best_ = {c, spread, time, per_step};
  }

  const Question& q_;
  Planner planner_;
  Choice best_;
  bool fits_ = false;
  int64_t least_shared_ = INT64_MAX;
};

constexpr std::pair<Exchange, const char*> kExchanges[] = {
    {Exchange::kBlock, "block"}, {Exchange::kCluster, "cluster"}, {Exchange::kGrid, "grid"}};

Plan step_plan(const Question& q) {
  const TileSizes& sizes = tile_sizes(q.arithmetic);
  Plan plan{};
  plan.strategy = "step";
  plan.column_tiles = 1;
  while (plan.column_tiles < sizes.most_column_tiles && plan.column_tiles * kColumns < q.shape.B)
    plan.column_tiles *= 2;
  plan.microseconds = Planner(q).launch_per_step_time();
  const int64_t state = q.directions * q.shape.B * q.shape.H;
  plan.workspace_bytes = round_up(state * sizes.sum_bytes, 16) + (q.shape.projected ? state * sizes.number_bytes : 0);
  plan.blocks = step_part(q, 0, plan.column_tiles).row_blocks *
                std::max<int64_t>(1, ceil_div(q.shape.B, plan.column_tiles * kColumns)) * q.directions;
  return plan;
}

Plan sequence_plan(const Question& q, const char* name, const Choice& choice) {
  Plan plan{};
  plan.strategy = name;
  plan.column_tiles = choice.candidate.column_tiles;
  plan.spread = choice.spread;
  plan.blocks = int64_t{choice.spread.ranks} * choice.spread.teams * q.directions;
  plan.shared_bytes = choice.spread.shared_bytes;
  plan.microseconds = choice.per_step;
  if (choice.spread.exchange == Exchange::kGrid)
    plan.workspace_bytes = q.directions * choice.spread.teams * choice.spread.exchange_words * 8;
  return plan;
}

std::string slower(double microseconds, const Plan& chosen) {
  char text[96];
  std::snprintf(text, sizeof(text), "predicted %.2f us a step, %s %.2f", microseconds, chosen.strategy.c_str(),
                chosen.microseconds);
  return text;
}

}  // namespace

Arithmetic arithmetic_of(Dtype dtype, bool tf32) {
  switch (dtype) {
    case Dtype::kBFloat16: return Arithmetic::kBf16;
    case Dtype::kFloat16: return Arithmetic::kFp16;
    case Dtype::kFloat32: return tf32 ? Arithmetic::kTf32 : Arithmetic::kFp32;
    case Dtype::kFloat64: return Arithmetic::kFp64;
  }
  throw std::logic_error("arithmetic_of: no such dtype");
}

StepPart step_part(const Question& q, int stage, int column_tiles) {
  const auto [T, B, I, H, P, projected] = q.shape;
  const bool gates = stage == 0 && !q.backward;
  const int64_t units = gates || (q.backward && stage == 1) ? H : P;
  const int64_t batch_tiles = std::max<int64_t>(1, ceil_div(B, column_tiles * kColumns));
  StepPart part{};
  part.stage = stage;
  // As many rows in a block as leave a block for every multiprocessor.
  for (part.warps_m = 8; part.warps_m > 1; part.warps_m /= 2) {
    const int64_t blocks = ceil_div(units * (gates ? 4 : 1), part.warps_m * kStepRows) * batch_tiles * q.directions;
    if (blocks >= q.device.sms) break;
  }
  const int width = part.warps_m * kStepRows / (gates ? 4 : 1);
  part.rows = {width, gates ? 4 : 1, static_cast<int>(units), H};
  part.row_blocks = static_cast<int>(ceil_div(units, width));
  return part;
}

Plan make_plan(const Question& q, const std::string& strategy) {
  std::optional<Plan> chosen;
  double chosen_time = INFINITY;
  std::vector<std::pair<Plan, double>> possible;
  std::vector<std::pair<std::string, std::string>> refused;
  bool known = strategy.empty() || strategy == "step";
  Search search(q);
  for (const auto& [exchange, name] : kExchanges) {
    known = known || strategy == name;
    if (!strategy.empty() && strategy != name) continue;
    std::string why;
    if (const std::optional<Choice> choice = search.best(exchange, why)) {
      possible.emplace_back(sequence_plan(q, name, *choice), choice->time);
    } else {
      refused.emplace_back(name, why);
    }
  }
  if (!known) {
    throw std::invalid_argument("strategy: expected 'block', 'cluster', 'grid' or 'step', got '" + strategy + "'");
  }
  if (strategy.empty() || strategy == "step") {
    const Plan plan = step_plan(q);
    possible.emplace_back(plan, plan.microseconds * q.shape.T);
  }
  for (const auto& [plan, time] : possible) {
    if (time < chosen_time) {
      chosen = plan;
      chosen_time = time;
    }
  }
  if (!chosen) throw std::runtime_error("strategy: '" + strategy + "' cannot run this: " + refused[0].second);
  for (const auto& [plan, time] : possible) {
    if (plan.strategy != chosen->strategy) refused.emplace_back(plan.strategy, slower(plan.microseconds, *chosen));
  }
  chosen->refused = refused;
  return *chosen;
}

}  // namespace lstm_ext::cuda
