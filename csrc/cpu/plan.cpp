// The planner of the CPU kernels, and every threshold it goes by.
//
// A threshold is a place where two ways take equally long. Beneath each stands the tuning that finds it again, to be
// run as `python benchmarks/tune.py TUNING`: it forces both ways on either side of the threshold, times them in turn,
// and prints where they cross on the machine at hand. Then follow the machine and the day on which the number was
// found: the EPYC is an AMD EPYC (Zen 4, AVX-512 with bfloat16 products, 1 MB of second-level cache a core), the Xeon
// an Intel Xeon with AMX (2 MB a core), the Zen 3 an AMD EPYC with AVX2 (512 KB a core), all with two cores.
#include "plan.h"

#include <atomic>
#include <mutex>
#include <stdexcept>
#include <type_traits>

#include "levels.h"

namespace lstm_ext::cpu {
namespace {

// ---- sizes of caches --------------------------------------------------------------------------------------

// A second-level cache as many processors have it, and a large one. They are assumed, not asked for: plans decide bits,
// and the same layer shall give the same bits on all machines of a SIMD level.
constexpr int64_t kUsualCache = 1 << 20, kLargeCache = 1 << 21;

// ---- vectors or tiles -------------------------------------------------------------------------------------

// Sequences in a batch from which on tiles are faster, by the planes of a factor (1, 2, 3): below, vectors read weights
// in place and multiply no rows of zeros. Twice as many where planes are several and the columns, I + P, are few:
// making planes costs as much as 160 (forward) or 384 (backward) columns' products do.
//   tile-rows, tile-columns; Xeon, 2026-11-25
constexpr int64_t kLeastTileRows[] = {1, 4, 8}, kLeastTileRowsBackward[] = {4, 4, 8};
constexpr int64_t kFewColumns = 160, kFewColumnsBackward = 384;

// Factors with the zeros that fill tiles up, against those that there are: fewer than 7/6 of them for batches below a
// tile's height, or in a backward pass, and 13/10 else. Zeros cost nothing that counts where one plane is multiplied.
//   tile-zeros; Xeon, 2026-11-25
struct Ratio {
  int64_t over, under;
};
constexpr Ratio kMostFilled = {13, 10}, kMostFilledFewRows = {7, 6}, kMostFilledBackward = {7, 6};
constexpr bool is_less(int64_t a, int64_t b, Ratio ratio) { return ratio.under * a < ratio.over * b; }

// Packing a matrix of P columns into tiles takes as long as multiplying P / 6 rows by it.
//   tile-packing; Xeon, 2026-11-25
constexpr int64_t kRowsPerPackedColumn = 6;

// Columns that a gradient has to be multiplied by to be worth transposing into tiles.
//   tile-transposed; Xeon, 2026-11-25
constexpr int64_t kLeastTransposedFor = 192;

// ---- packed or in place -----------------------------------------------------------------------------------

// Weights of K columns are read in place if what that costs is less than K, which is what packing costs, all counted in
// vectors of products: a sum over lanes for each row that is multiplied; and, where K is no whole number of vectors, a
// second load for each vector that crosses a cache line, in each pass over the matrix. If a second-level cache does not
// hold both copies packing costs twice as much; and a matrix well beyond it waits for memory, not for loads.
// Where registers are few, so are the rows that a weight is read for, and packing pays earlier, from near and far.
//   in-place (kCostOfSum); EPYC, 2026-11-22
//   in-place, in-place-bytes (kCostOfSumFewRows, of both); Zen 3, 2026-11-27
//   in-place-lines, in-place-bytes (the others); Xeon, 2026-11-25
constexpr int64_t kCostOfSum = 6, kCostOfSumFar = 3, kCostOfSumFewRows = 8, kCostOfCrossing = 14;
constexpr int64_t kNearBytes = kUsualCache, kCrossingBytes = kUsualCache + kUsualCache / 4;

// Weights in TensorFlow's layout are read in place for so many rows in all; packing transposes none of them.
//   a step of BasicLSTMCell against one of LSTMCell, H 128 and 512, B 16 to 64, with `use_plan(in_place=…)`; EPYC,
//   2026-11-26
constexpr int64_t kMostKernelRows = 40;

// ---- one sequence by itself -------------------------------------------------------------------------------

// Units up to which a step is waiting more than work.
//   freeze(…).stream() with a block of 4096 steps, I 1, against benchmarks/compare.py's base; EPYC, 2026-11-26
constexpr int64_t kMostUnitsAlone = 96;

// ---- blocks of K ------------------------------------------------------------------------------------------

// Rows read in place, of which a first-level cache holds what several rows multiply; each block costs a sum over lanes.
// Packed panels are not cut: a second-level cache is faster than loading sums again (1.04 to 1.3 times as fast as
// blocks of 24 KB, with K from 300 to 4096; benchmarks/tune.py panel-depth; EPYC, 2026-11-26).
//   in-place-depth; Xeon, 2026-11-25
constexpr int64_t kInPlaceDepth = 512;

// ---- chunks -----------------------------------------------------------------------------------------------

// Of sums waiting for their recurrent part, or of copies of x where those are larger. The weights are read once for a
// chunk: it is as large as w_ih, within these bounds. But if half a second-level cache holds the weights of both
// products it is short: then sums come back from the same cache, and reading weights again costs nothing.
//   chunk-bytes, chunk-near; Xeon, 2026-11-25
constexpr int64_t kLeastChunkBytes = 1 << 17, kMostChunkBytes = kLargeCache;
constexpr int64_t kHeldWithVectors = kUsualCache / 2, kHeldWithTiles = kLargeCache / 2;  // AMX comes with large ones

// A backward chunk is of gate gradients, which stay in half a cache while they are multiplied; and of so many rows at
// least that the weight gradients are worth a pass over their sums.
//   backward-chunk-bytes, backward-chunk-rows; EPYC, 2026-11-22
constexpr int64_t kBackwardChunkBytes = kUsualCache / 2, kLeastBackwardRows = 256;

// ---- threads ----------------------------------------------------------------------------------------------

// Waking a second thread costs some microseconds, and waiting for each other at each step some tenths of one. Less work
// in all than this: one thread. Members who wait for each other: one for each of these that a step has.
//   threads (kLeastFlops); Xeon, 2026-11-25
//   threads-step (kLeastFlopsPerStepAndMember); EPYC, 2026-11-22
constexpr double kLeastFlops = 6e5, kLeastFlopsPerStepAndMember = 5e4;

// Layers of a stack that have no work for two threads in a step may have one each, and do a block of steps at a time. A
// block costs a call and a wait, some tenths of a microsecond, so that it needs some work; and there are some tens of
// them at the most, since each layer begins one block later than the one before.
//   two to four frozen layers of 16 to 96 units, 50 to 512 steps, on one thread and on two; EPYC, 2026-11-26
constexpr double kLeastFlopsPerRound = 3e5;
constexpr int64_t kMostRounds = 32;
constexpr double kLeastSpeedOfRounds = 1.3;  // times that of one thread

// Speed of products by tiles over those by vectors of floats, were each multiplication of planes the only one: 6, and a
// float times a float takes 6.
//   tile-speed; Xeon, 2026-11-25
constexpr double kTileSpeed = 6;

// With rows of their own members do not wait for each other, but each reads all weights at each step. So they share
// rows if each gets a tile of them and half a cache holds the weights. Where panels cannot be divided evenly, so that
// one member has over 11/10 of its part, they share rows from half as many on. Of tile registers half full is enough.
//   by-rows; EPYC, 2026-11-24
//   by-rows-tiles (kLeastTileFilled); Xeon, 2026-11-25
constexpr int kLeastTileFilled = kTileHeight / 2;
constexpr int64_t kHeldByEach = kUsualCache / 2;
constexpr Ratio kEvenPanels = {11, 10};
constexpr int64_t kUnevenRows = 2;

// ---- what is forced ---------------------------------------------------------------------------------------

std::atomic<bool> is_forced{false};
std::mutex forced_mutex;
Forced forced_now;

[[noreturn]] void refuse(const char* what) { throw std::invalid_argument(what); }

// ---- engine -----------------------------------------------------------------------------------------------

constexpr const char* kNormsByVectors = "engine: gradients of layer normalisation are computed by vectors";
constexpr const char* kNarrowByVectors = "engine: weights narrower than float32 are multiplied by vectors";
constexpr const char* kKernelByVectors = "engine: weights in TensorFlow's layout are multiplied by vectors";

// null: tiles are faster
const char* why_vectors(const Problem& problem, const LevelShape& level, const EngineShape& tiles) {
  if (!level.has_tiles) return "this SIMD level has no tile registers";
  if (problem.by_columns) return kKernelByVectors;
  if (problem.storage != Storage::kPlain) return kNarrowByVectors;
  if (problem.normed && problem.backward) return kNormsByVectors;
  if (problem.dtype == Dtype::kFloat64) return "tiles have no float64 sums";
  const SequenceShape& shape = problem.shape;
  const int planes = tiles.column_planes;
  const int64_t columns = shape.I + shape.P;
  const bool backward = problem.backward, few_rows = shape.B < kTileHeight;

  if (backward) {
    const int64_t filled = kTileHeight * tiles.up(shape.H, kTileHeight);
    if (!is_less(filled, shape.H, kMostFilledBackward)) return "too many of the units in tiles would be zeros";
    if (columns < kLeastTransposedFor) return "too few columns to transpose gradients for";
  } else if (planes > 1) {
    const int64_t filled = kTileDepth * (tiles.up(shape.I, kTileDepth) + tiles.up(shape.P, kTileDepth));
    const Ratio most = few_rows ? kMostFilledFewRows : kMostFilled;
    if (!is_less(filled, columns, most)) return "too many of the columns in tiles would be zeros";
  }
  const bool few = planes > 1 && columns < (backward ? kFewColumnsBackward : kFewColumns);
  const int64_t least = (backward ? kLeastTileRowsBackward : kLeastTileRows)[planes - 1];
  if (shape.B < (few ? 2 * least : least)) return "too few sequences for tiles";
  if (!backward && kRowsPerPackedColumn * shape.T * shape.B < shape.P) return "too few rows for weights in tiles";
  return nullptr;
}

EngineKind choose_engine(const Problem& problem, const LevelShape& level, const Forced* forced, const char*& why) {
  if (forced && forced->engine) {
    why = "forced";
    if (*forced->engine == EngineKind::kTiles && problem.dtype == Dtype::kFloat64) {
      refuse("engine: tiles have no float64 sums");
    }
    if (*forced->engine == EngineKind::kTiles && problem.by_columns) refuse(kKernelByVectors);
    if (*forced->engine == EngineKind::kTiles && problem.storage != Storage::kPlain) refuse(kNarrowByVectors);
    if (*forced->engine == EngineKind::kTiles && problem.normed && problem.backward) refuse(kNormsByVectors);
    return *forced->engine;
  }
  why = why_vectors(problem, level, engine_shape(level, EngineKind::kTiles, problem.dtype, problem.backward));
  if (why) return EngineKind::kVectors;
  why = "tiles are faster for so many sequences and columns";
  return EngineKind::kTiles;
}

Load load_of(int64_t rows, int64_t panels, int64_t bytes, const EngineShape& engine) {
  const int least_rows = engine.kind == EngineKind::kTiles ? kLeastTileFilled : engine.full_rows;
  return {rows, engine.tile_rows, least_rows, panels, bytes};
}

// ---- a forward pass ---------------------------------------------------------------------------------------

double flops_of_step(const SequenceShape& shape) {
  return 8. * static_cast<double>(shape.B) * static_cast<double>(shape.H) * static_cast<double>(shape.I + shape.P);
}

// Passes over weights in place: a division is worth avoiding for the smallest layers.
int64_t row_tiles(int64_t rows, const EngineShape& engine) {
  return rows <= engine.full_rows ? rows > 0 : ceil_div(rows, engine.full_rows);
}

// `rows` are multiplied by a matrix of K columns, in so many passes over it; `bytes`: of its packed copy.
bool in_place_pays(int64_t K, int64_t bytes, int64_t rows, int64_t passes, const EngineShape& engine) {
  const bool crosses_lines = (K & (engine.lanes * engine.per_lane - 1)) != 0;
  const int64_t enough = bytes < kNearBytes ? kCostOfSum : kCostOfSumFar;
  const int64_t sums = rows * (engine.full_rows < engine.tile_rows ? kCostOfSumFewRows : enough);
  const int64_t loads = crosses_lines && bytes < kCrossingBytes ? passes * kCostOfCrossing : 0;
  return sums + loads < K;
}

// Both products of TensorFlow's kernel, which is one matrix
bool kernel_in_place(const SequenceShape& shape, const Forced* forced) {
  if (forced && forced->in_place[kRecurrent]) return *forced->in_place[kRecurrent];
  return shape.T * shape.B <= kMostKernelRows;
}

void choose_in_place(Plan& plan, const Problem& problem, const EngineShape& engine, const int64_t (&bytes)[3],
                     const Forced* forced) {
  const auto [T, B, I, H, P, projected] = problem.shape;
  if (problem.by_columns) {
    plan.in_place[kInput] = plan.in_place[kRecurrent] = kernel_in_place(problem.shape, forced);
    return;
  }
  const bool vectors = engine.kind == EngineKind::kVectors;
  if (problem.packed && vectors) return;
  if (vectors) {
    const int64_t rows = T * B, step_passes = T * row_tiles(B, engine);
    plan.in_place[kInput] = in_place_pays(I, bytes[kInput], rows, row_tiles(rows, engine), engine);
    plan.in_place[kRecurrent] = in_place_pays(P, bytes[kRecurrent], rows, step_passes, engine);
    plan.in_place[kProjection] = projected && in_place_pays(H, bytes[kProjection], rows, step_passes, engine);
  }
  if (!forced) return;
  for (int n = 0; n < 3; ++n) {
    if (!forced->in_place[n] || (n == kProjection && !projected)) continue;
    if (*forced->in_place[n] && !vectors) refuse("in_place: tiles multiply packed weights only");
    plan.in_place[n] = *forced->in_place[n];
  }
}

int64_t chunk_bytes(const EngineShape& engine, const int64_t (&bytes)[3], const char*& why) {
  const int64_t held = engine.kind == EngineKind::kTiles ? kHeldWithTiles : kHeldWithVectors;
  why = "as few as pay: w_ih is small";
  if (bytes[kInput] < kLeastChunkBytes) return kLeastChunkBytes;
  why = "as few as pay: a cache holds the weights of both products";
  if (bytes[kInput] + bytes[kRecurrent] <= held) return kLeastChunkBytes;
  why = "sums as large as w_ih";
  if (bytes[kInput] <= kMostChunkBytes) return bytes[kInput];
  why = "as many as a large cache holds the sums of";
  return kMostChunkBytes;
}

int64_t within_steps(int64_t steps, int64_t T) { return steps < 1 ? 1 : steps > T ? T : steps; }

void choose_forward_chunk(Plan& plan, const SequenceShape& shape, const EngineShape& engine, const int64_t (&bytes)[3],
                          const Forced* forced) {
  const auto [T, B, I, H, P, projected] = shape;
  plan.borrow_x = engine.borrows_rows && (I & (engine.per_lane - 1)) == 0;
  const int64_t sums = engine.unit_panels(H) * 4 * engine.lanes * engine.sum_bytes;
  const int64_t copies = plan.borrow_x ? 0 : engine.row_bytes(I);
  const int64_t step_bytes = B * (sums > copies ? sums : copies);
  const int64_t most = chunk_bytes(engine, bytes, plan.why.chunk_steps);
  const bool all = T * step_bytes <= most;
  if (all) plan.why.chunk_steps = "all: they are few";
  plan.chunk_steps = all ? T : within_steps(most / step_bytes, T);
  if (forced && forced->chunk_steps) {
    plan.chunk_steps = within_steps(*forced->chunk_steps, T);
    plan.why.chunk_steps = "forced";
  }
}

// One pass over the rows has no use for several blocks.
int64_t block_depth(const Plan& plan, Weight weight, int64_t K, int64_t rows, const EngineShape& engine) {
  const bool cut = plan.in_place[weight] && rows > engine.full_rows && kInPlaceDepth < K;
  return cut ? kInPlaceDepth : K;
}

void check_depth(int64_t depth, const EngineShape& engine) {
  if (engine.kind == EngineKind::kTiles && depth % kTileDepth) refuse("depth: expected a multiple of 32 for tiles");
  if (depth % engine.per_lane) refuse("depth: expected an even number, as bfloat16 is multiplied in pairs");
}

void choose_depth(Plan& plan, const Problem& problem, const EngineShape& engine, const Forced* forced) {
  const auto [T, B, I, H, P, projected] = problem.shape;
  plan.depth[kInput] = block_depth(plan, kInput, I, plan.chunk_steps * B, engine);
  plan.depth[kRecurrent] = block_depth(plan, kRecurrent, P, B, engine);
  const bool short_rows = I <= kInPlaceDepth && P <= kInPlaceDepth;  // not worth several blocks
  const bool both_in_place = plan.in_place[kInput] && plan.in_place[kRecurrent];
  plan.one_sum = both_in_place && !problem.by_columns && (short_rows || B <= engine.full_rows);
  if (!forced) return;
  if (forced->depth && !engine.scaled) {
    check_depth(*forced->depth, engine);
    plan.depth[kInput] = *forced->depth < I ? *forced->depth : I;
    plan.depth[kRecurrent] = *forced->depth < P ? *forced->depth : P;
  }
  if (forced->one_sum && !problem.packed) {
    if (*forced->one_sum && !both_in_place) refuse("one_sum: w_ih and w_hh must both be in place");
    if (*forced->one_sum && problem.by_columns) refuse("one_sum: expected weights that are no TensorFlow kernel");
    plan.one_sum = *forced->one_sum;
  }
}

// Only what is packed, and what a second thread would not help with: plans of one thread and of two have the same bits.
bool goes_alone(const Problem& problem, const Plan& plan, const EngineShape& engine) {
  const SequenceShape& shape = problem.shape;
  const bool can = problem.simple && problem.storage == Storage::kPlain && !problem.by_columns && shape.B == 1 &&
                   engine.kind == EngineKind::kVectors && engine.borrows_rows && engine.per_lane == 1;
  if (!can || plan.in_place[kRecurrent] || shape.H > kMostUnitsAlone) return false;
  return problem.packed || flops_of_step(shape) < 2 * kLeastFlopsPerStepAndMember;
}

void plan_forward(Plan& plan, const Problem& problem, const EngineShape& engine, const Forced* forced) {
  const SequenceShape& shape = problem.shape;
  const int64_t panels = engine.unit_panels(shape.H);
  const int64_t bytes[3] = {panels * engine.panel_bytes(shape.I), panels * engine.panel_bytes(shape.P),
                            shape.projected ? engine.column_panels(shape.P) * engine.panel_bytes(shape.H) : 0};
  choose_in_place(plan, problem, engine, bytes, forced);
  const bool as_it_lies = forced && forced->in_place[kInput] == true && shape.I <= kFewInputs;
  plan.alone = !as_it_lies && goes_alone(problem, plan, engine);
  if (plan.alone && shape.I <= kFewInputs) plan.in_place[kInput] = false;
  choose_forward_chunk(plan, shape, engine, bytes, forced);
  choose_depth(plan, problem, engine, forced);
  plan.load = load_of(shape.B, panels, bytes[kRecurrent], engine);
}

// ---- a backward pass --------------------------------------------------------------------------------------

// Of TensorFlow's kernel, whose rows a backward pass sums over: they need not be transposed into panels.
void choose_kernel_in_place(Plan& plan, const SequenceShape& shape, const EngineShape& engine, const Forced* forced) {
  const int64_t K = 4 * shape.H, rows = shape.T * shape.B, widths[] = {shape.I, shape.P};
  const int64_t passes[] = {row_tiles(rows, engine), shape.T * row_tiles(shape.B, engine)};
  for (const Weight weight : {kInput, kRecurrent}) {
    const int64_t bytes = engine.column_panels(widths[weight]) * engine.panel_bytes(K);
    plan.in_place[weight] = in_place_pays(K, bytes, rows, passes[weight], engine);
    if (forced && forced->in_place[weight]) plan.in_place[weight] = *forced->in_place[weight];
  }
}

void plan_backward(Plan& plan, const Problem& problem, const EngineShape& engine, const Forced* forced) {
  const auto [T, B, I, H, P, projected] = problem.shape;
  if (problem.by_columns) choose_kernel_in_place(plan, problem.shape, engine, forced);
  const int64_t row_bytes = 4 * H * engine.sum_bytes;
  int64_t rows = row_bytes > 0 ? kBackwardChunkBytes / row_bytes : 0;
  plan.why.chunk_steps = "as many as half a cache holds the gradients of";
  if (rows < kLeastBackwardRows) {
    rows = kLeastBackwardRows;
    plan.why.chunk_steps = "as few as weight gradients are worth adding up for";
  }
  plan.chunk_steps = rows >= T * B ? T : ceil_div(rows, B);
  if (plan.chunk_steps >= T) plan.why.chunk_steps = "all: they are few";
  plan.depth[0] = plan.depth[1] = kMostSumDepth;
  if (forced && forced->chunk_steps) {
    plan.chunk_steps = within_steps(*forced->chunk_steps, T);
    plan.why.chunk_steps = "forced";
  }
  if (forced && forced->depth) {
    check_depth(*forced->depth, engine);
    plan.depth[0] = plan.depth[1] = *forced->depth < kMostSumDepth ? *forced->depth : kMostSumDepth;
  }
  const int64_t gate = engine.kind == EngineKind::kTiles ? engine.lanes * engine.up(H, engine.lanes) : H;
  const int64_t panels = engine.column_panels(P);
  plan.load = load_of(B, panels, panels * engine.panel_bytes(4 * gate), engine);
}

// ---- threads ----------------------------------------------------------------------------------------------

bool load_divides_by_rows(const Load& load, int members) {
  if (members == 1) return true;
  const int64_t most_panels = ceil_div(load.panels, members);  // of one member
  const int64_t least_rows = load.least_rows * static_cast<int64_t>(members);
  const bool even = kEvenPanels.under * most_panels * members <= kEvenPanels.over * load.panels;
  return even ? load.rows >= least_rows && load.bytes <= kHeldByEach : kUnevenRows * load.rows >= least_rows;
}

// Threads that pay: one if there is little to do in all. If members wait for each other at each step, as many for each
// of the directions that run at the same time as a step has work and panels for.
int choose_threads(const Problem& problem, const EngineShape& engine, const Plan& plan, const char*& why) {
  const SequenceShape& shape = problem.shape;
  const int threads = problem.num_threads, directions = problem.backward ? 1 : problem.num_directions;
  why = "one is there";
  if (threads <= 1) return threads;
  double step = flops_of_step(shape);  // in operations that take as long by vectors of floats
  if (engine.kind == EngineKind::kTiles) {
    step /= kTileSpeed / tile_products(engine.row_planes, engine.column_planes);
  }
  why = "too little work for a second one";
  if (step * static_cast<double>(shape.T) < kLeastFlops) return 1;
  why = "one for each direction: a step has too little work for more";
  if (plan.alone) return threads < directions ? threads : directions;
  why = "all: one for each direction";
  if (threads <= directions) return threads;
  const int each = threads / directions;
  why = "all: with rows of their own they do not wait";
  if (plan.divides_rows(each)) return threads;
  const double members = step / kLeastFlopsPerStepAndMember;
  why = "all: a step has work for them";
  int64_t worth = each;
  if (members < each) {
    why = "as many as a step has work for";
    worth = static_cast<int64_t>(members);
  }
  if (worth > plan.load.panels) {
    why = "as many as there are panels";
    worth = plan.load.panels;
  }
  if (worth > 1) worth = ceil_div(plan.load.panels, ceil_div(plan.load.panels, worth));  // more would do no more
  const int64_t most = problem.shape.B * kUnevenRows / plan.load.least_rows;
  int by_rows = each - 1 < most || plan.by_rows_is_forced ? each - 1 : static_cast<int>(most);
  while (by_rows > worth && !plan.divides_rows(by_rows)) --by_rows;
  if (by_rows > worth) {
    why = "as many as have rows of their own, and do not wait";
    worth = by_rows;
  }
  return directions * (worth > 1 ? static_cast<int>(worth) : 1);
}

void choose_team(Plan& plan, const Problem& problem, const EngineShape& engine, const Forced* forced) {
  if (forced && forced->by_rows) {
    plan.by_rows_is_forced = true;
    plan.by_rows = *forced->by_rows;
  }
  plan.threads = choose_threads(problem, engine, plan, plan.why.threads);
  if (forced && forced->threads) {
    plan.threads = static_cast<int>(*forced->threads);
    plan.why.threads = "forced";
  }
  const bool at_once = !problem.backward && problem.num_directions == 2 && plan.threads > 1;
  plan.by_rows = plan.divides_rows(at_once ? plan.threads - plan.threads / 2 : plan.threads);
}

Plan make_plan(const Problem& problem, const LevelShape& level, const Forced* forced) {
  Plan plan{};
  plan.engine = choose_engine(problem, level, forced, plan.why.engine);
  const EngineShape engine = engine_shape(level, plan.engine, problem.dtype, problem.backward, problem.storage);
  (problem.backward ? plan_backward : plan_forward)(plan, problem, engine, forced);
  choose_team(plan, problem, engine, forced);
  return plan;
}

}  // namespace

bool Plan::divides_rows(int members) const {
  if (members <= 1) return true;
  return by_rows_is_forced ? by_rows : load_divides_by_rows(load, members);
}

Plan make_plan(const Problem& problem, const LevelShape& level) {
  if (!is_forced.load(std::memory_order_acquire)) return make_plan(problem, level, nullptr);
  const std::lock_guard<std::mutex> lock(forced_mutex);
  return make_plan(problem, level, &forced_now);
}

bool is_brief(const SequenceShape& shape) { return flops_of_step(shape) * static_cast<double>(shape.T) < kLeastFlops; }

template <class Layer>
static Plan plan_of(const Layer& layer, bool backward) {
  Problem problem{layer.dtype, layer.shape, layer.num_directions, backward, layer.num_threads};
  if (layer.cell) {
    problem.by_columns = layer.cell->options.tensorflow;
    problem.normed = layer.cell->options.norm != Norm::kNone;
  }
  if constexpr (std::is_same_v<Layer, LayerForward>) {
    problem.packed = layer.direction[0].packed != nullptr;
    problem.simple = !layer.cell && !layer.shape.projected && !layer.masks.lengths && !layer.masks.resets;
    problem.storage = layer.storage;
  }
  return make_plan(problem, kernels().shape);
}

Plan plan_forward(const LayerForward& layer) { return plan_of(layer, false); }

// Times as fast as one thread, at best: all of the layers' work over that of the member who has most.
double speed_of_rounds(const SequenceShape& shape, int layers, int threads) {
  SequenceShape later = shape;  // a layer after the first one
  later.I = shape.P;
  const double first = flops_of_step(shape), other = flops_of_step(later);
  const int members = layers < threads ? layers : threads;
  const int64_t most = ceil_div(layers, members);  // layers of the member who has the first one
  const int64_t beside = ceil_div(layers - 1, members);
  const double with_first = first + static_cast<double>(most - 1) * other,
               without = static_cast<double>(beside) * other;
  return (first + (layers - 1) * other) / (with_first > without ? with_first : without);
}

int64_t steps_of_round(const LayerForward& layer, int layers) {
  const SequenceShape& shape = layer.shape;
  const bool whole = layer.num_directions == 1 && !layer.direction[0].reverse && !layer.masks.lengths &&
                     !layer.x_map.packed_offset && shape.B > 0;
  // A block leaves its state as the layer stores it: what half types round there would not be rounded within a pass.
  // How int8 rows are scaled depends on the state that a pass begins with.
  const bool exact =
      (layer.dtype == Dtype::kFloat32 || layer.dtype == Dtype::kFloat64) && layer.storage != Storage::kInt8;
  if (layers < 2 || layer.num_threads < 2 || !whole || !exact) return 0;
  if (plan_forward(layer).threads > 1 || speed_of_rounds(shape, layers, layer.num_threads) < kLeastSpeedOfRounds)
    return 0;
  SequenceShape widest = shape;
  if (widest.I < shape.P) widest.I = shape.P;
  const auto least = static_cast<int64_t>(kLeastFlopsPerRound / flops_of_step(widest)) + 1;
  const int64_t even = ceil_div(shape.T, kMostRounds), steps = even > least ? even : least;
  if (2 * steps > shape.T) return 0;
  LayerForward block = layer;  // blocks must be multiplied as all steps together are
  for (const int64_t T : {shape.T, steps, shape.T % steps}) {
    block.shape.T = T > 0 ? T : steps;
    for (const int64_t I : {shape.I, shape.P}) {
      block.shape.I = I;
      if (plan_forward(block).engine != EngineKind::kVectors) return 0;
    }
  }
  return steps;
}

Plan plan_backward(const LayerBackward& layer) { return plan_of(layer, true); }

void force(const Forced& forced) {
  const bool tiles = forced.engine == EngineKind::kTiles;
  if (tiles && !kernels().shape.has_tiles) refuse("engine: the SIMD level in use has no tile registers");
  bool anything =
      forced.engine || forced.one_sum || forced.chunk_steps || forced.depth || forced.threads || forced.by_rows;
  for (const std::optional<bool>& in_place : forced.in_place) {
    if (tiles && in_place == true) refuse("in_place: tiles multiply packed weights only");
    anything = anything || in_place;
  }
  if (forced.one_sum == true && (tiles || forced.in_place[kInput] == false || forced.in_place[kRecurrent] == false)) {
    refuse("one_sum: w_ih and w_hh must both be in place");
  }
  if (forced.chunk_steps && *forced.chunk_steps < 1) refuse("chunk_steps: expected at least 1");
  if (forced.depth && *forced.depth < 1) refuse("depth: expected at least 1");
  if (forced.threads && (*forced.threads < 1 || *forced.threads > 1024)) refuse("threads: expected 1 to 1024");
  const std::lock_guard<std::mutex> lock(forced_mutex);
  forced_now = forced;
  is_forced.store(anything, std::memory_order_release);
}

}  // namespace lstm_ext::cpu
