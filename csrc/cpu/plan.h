// How one pass over a layer is computed: all that is to be decided, decided in one place, before the kernels run.
// Compiled once, not for each SIMD level. The thresholds are in plan.cpp, each with the command that finds it.
#pragma once

#include <bit>
#include <cstdint>
#include <optional>

#include "../params.h"

namespace lstm_ext::cpu {

// Inlined even without optimisation, as the kernels use them too: no SIMD level may run another's copy.
#define LSTM_EXT_PLAN_INLINE __attribute__((always_inline)) constexpr

LSTM_EXT_PLAN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- what the planner knows of the kernels ----------------------------------------------------------------

// Of one SIMD level.
struct LevelShape {
  int vec_bytes;       // of a vector register
  int tile_rows;       // of the micro-kernel of vectors
  int full_rows;       // that it multiplies by four vectors at once
  bool bf16_in_pairs;  // an instruction adds the products of neighbouring bfloat16 pairs to float sums
  bool int8_in_fours;  // another those of four neighbouring bytes to int32 sums
  bool has_tiles;      // there are tile registers
};

// What multiplies: vector registers, or tile registers where sums are float.
enum class EngineKind : uint8_t { kVectors, kTiles };

// A tile register (AMX) holds 16 rows of 16 float sums, or of 32 bfloat16 factors.
inline constexpr int kTileHeight = 16, kTileDepth = 32, kTileBytes = 1024;

// Products of bfloat16 that tiles make for one product of numbers that are sums of several (planes): of those planes
// whose numbers, counted from 0, add up to two at the most. The others are below the last bit of a float product.
LSTM_EXT_PLAN_INLINE int tile_products(int row_planes, int column_planes) {
  int count = 0;
  for (int n = 0; n < row_planes; ++n) count += column_planes < 3 - n ? column_planes : 3 - n;
  return count;
}

// In the weights' gradients, products of so many rows are added up before sums in memory are: what a first-level cache
// holds of a panel. (benchmarks/tune.py sum-depth; Xeon with AMX, 2026-11-25)
inline constexpr int64_t kMostSumDepth = 512;

// Columns of gradients that are brought together to be multiplied by all panels: a part of a second-level cache, beside
// a panel. It is worth it for so many columns of panels in all. (a training step of 16 sequences by widths 16 to 64,
// with benchmarks/compare.py; Zen 3, 2026-11-27)
inline constexpr int64_t kGatheredBytes = 1 << 17, kLeastGatheredFor = 64;

// One engine for one dtype: what sums (C), factors (F) and panels measure. kernels.cpp holds it against the templates.
struct EngineShape {
  EngineKind kind;
  bool borrows_rows;              // rows of the stored type may be multiplied where they lie
  int lanes, sum_bytes;           // sums in a vector, bytes of one
  int factor_bytes;               // of a row
  int per_lane;                   // neighbouring factors in a lane
  int tile_rows;                  // the most that are multiplied together
  int full_rows;                  // of vectors: by four of them at once
  int row_planes, column_planes;  // bfloat16 numbers that one factor is made of; 1 for vectors
  int lane_bytes;                 // of vectors: of the weights that one lane multiplies
  bool scaled;  // factors and weights are integers; a row has scales before and marks behind, a panel scales and starts

  // Bytes of a row of K factors; of tiles an odd number of cache lines.
  LSTM_EXT_PLAN_INLINE int64_t row_bytes(int64_t K) const {
    const int64_t vectors = up(K, lanes);
    if (kind == EngineKind::kVectors) return lanes * (vectors + scaled * (1 + up(vectors, lanes))) * factor_bytes;
    return (row_planes * up(K, kTileDepth) | 1) * kTileDepth * 2;
  }
  // Bytes of a panel of K factors by four vectors.
  LSTM_EXT_PLAN_INLINE int64_t panel_bytes(int64_t K) const {
    if (kind == EngineKind::kVectors) return (up(K, per_lane) * lane_bytes + scaled * 2 * sum_bytes) * 4 * lanes;
    return up(K, kTileDepth) * 4 * column_planes * kTileBytes;
  }
  // Panels of H units (the four gates of a vector of them), and of N columns.
  LSTM_EXT_PLAN_INLINE int64_t unit_panels(int64_t H) const { return up(H, lanes); }
  LSTM_EXT_PLAN_INLINE int64_t column_panels(int64_t N) const { return up(N, 4 * lanes); }

  // n / step, rounded up; step is a power of two
  static LSTM_EXT_PLAN_INLINE int64_t up(int64_t n, int step) {
    return (n + step - 1) >> std::countr_zero(static_cast<unsigned>(step));
  }
};

// For the forward or the backward pass of a layer of this dtype, whose factors on one side are then gradients.
constexpr EngineShape engine_shape(const LevelShape& level, EngineKind kind, Dtype dtype, bool backward,
                                   Storage storage = Storage::kPlain) {
  const bool is_double = dtype == Dtype::kFloat64, is_bf16 = dtype == Dtype::kBFloat16;
  if (kind == EngineKind::kTiles) {
    const int planes = dtype == Dtype::kFloat32 ? 3 : is_bf16 ? 1 : 2;
    return {kind, false, kTileHeight, 4, 2, 1, kTileHeight, kTileHeight, backward ? 3 : planes, planes, 4, false};
  }
  const int sum_bytes = is_double ? 8 : 4, per_lane = !backward && is_bf16 && level.bf16_in_pairs ? 2 : 1;
  const bool as_stored = backward || dtype == Dtype::kFloat32 || is_double || per_lane == 2;
  const int lanes = level.vec_bytes / sum_bytes;
  if (storage == Storage::kInt8) {
    const int neighbours = level.int8_in_fours ? 4 : 2;
    return {kind, false, lanes, sum_bytes, 2, neighbours, level.tile_rows, level.full_rows, 1, 1, neighbours, true};
  }
  const int lane_bytes = storage == Storage::kBFloat16 ? 2 : sum_bytes;
  return {kind, as_stored, lanes,      sum_bytes, sum_bytes / per_lane, per_lane, level.tile_rows, level.full_rows,
          1,    1,         lane_bytes, false};
}

// Of the packed weights of one direction: its matrices and its bias one after the other, each from a cache line on.
LSTM_EXT_PLAN_INLINE int64_t packed_bytes(const EngineShape& engine, const SequenceShape& shape) {
  const auto lines = [](int64_t bytes) { return (bytes + 63) & ~int64_t{63}; };
  const int64_t panels = engine.unit_panels(shape.H);
  const int64_t projection = shape.projected ? engine.column_panels(shape.P) * engine.panel_bytes(shape.H) : 0;
  return lines(panels * engine.panel_bytes(shape.I)) + lines(panels * engine.panel_bytes(shape.P)) + lines(projection) +
         lines(panels * 4 * engine.lanes * engine.sum_bytes);
}

// ---- the plan ---------------------------------------------------------------------------------------------

struct Problem {
  Dtype dtype;
  SequenceShape shape;
  int num_directions;
  bool backward;
  int num_threads;          // that may be used
  bool by_columns = false;  // weights are in TensorFlow's layout
  bool normed = false;      // there is layer normalisation
  bool packed = false;      // weights are frozen: packed for vectors
  bool simple = false;      // the plain LSTM without a projection, of which no row is masked
  Storage storage = Storage::kPlain;
};

// What there is to share out at each step: sequences, and panels of the recurrent weights.
struct Load {
  int64_t rows;
  int tile_rows, least_rows;  // of a tile: as many as it holds, and as few as it is still worth having
  int64_t panels, bytes;      // of the weights
};

// Inputs that steps of a sequence by itself multiply meanwhile, not for a chunk before.
inline constexpr int64_t kFewInputs = 4;

enum Weight { kInput, kRecurrent, kProjection };  // w_ih, w_hh, w_hr

struct Plan {
  // These decide the bits of the results, and are made from sizes, dtype and SIMD level alone.
  EngineKind engine;
  bool in_place[3];     // forward: weights are read where they lie, not packed
  bool one_sum;         // forward: a chunk of a single step adds both of its products up at once (both in place)
  int64_t chunk_steps;  // steps whose products with the inputs are done together
  bool alone;           // forward: one sequence of a narrow layer, step by step with as little waiting as can be
  int64_t depth[2];     // how much of K goes by before the next block of it: x·w_ih and h·w_hh; backward: of rows in dW

  // These do not.
  bool borrow_x;  // forward: x is multiplied where it lies
  int threads;
  bool by_rows;  // members of a team share the rows of a batch, not the panels of the weights
  Load load;
  bool by_rows_is_forced;

  struct {
    const char *engine, *chunk_steps, *threads;
  } why;

  // The same for a team of some size: one may turn out smaller than planned.
  bool divides_rows(int members) const;
};

Plan make_plan(const Problem& problem, const LevelShape& level);

// Whether one thread does it in some microseconds, so that nobody need know of more, nor be let go on meanwhile.
bool is_brief(const SequenceShape& shape);

// Of a frozen stack of so many such layers, of which this is the first one: steps of a block, if each layer works by
// itself, on a block that the one before it has done; 0 if one layer after the other does all steps.
int64_t steps_of_round(const LayerForward& layer, int layers);

// For the level in use. Throw std::invalid_argument if what is forced cannot be done.
Plan plan_forward(const LayerForward& layer);
Plan plan_backward(const LayerBackward& layer);

// ---- for tests and benchmarks -----------------------------------------------------------------------------

// What plans of this process shall be; the rest is as planned. Sizes are cut off where they are too large.
struct Forced {
  std::optional<EngineKind> engine;
  std::optional<bool> in_place[3];
  std::optional<bool> one_sum;
  std::optional<int64_t> chunk_steps, depth, threads;
  std::optional<bool> by_rows;
};

// Throws std::invalid_argument for what no layer could do at the level in use.
void force(const Forced& forced);

}  // namespace lstm_ext::cpu
