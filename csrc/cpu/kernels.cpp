// Compiled once for each SIMD level (LSTM_EXT_SIMD_LEVEL names it), always from this one source: which instance of the
// two passes a plan asks for, and a team to run it. A level may be built on another one (LSTM_EXT_SIMD_BASE names it):
// it then has only what its own instructions change, and the rest is the other's.
#include <new>
#include <type_traits>

#include "backward_cell.h"
#include "backward_grads.h"
#include "forward_alone.h"
#include "forward_cell.h"
#include "levels.h"

namespace lstm_ext::cpu {

#if defined(LSTM_EXT_SIMD_BASE)
namespace LSTM_EXT_SIMD_BASE {
extern const Kernels kKernels;
}
#endif

namespace LSTM_EXT_SIMD_LEVEL {
namespace {

// ---- what the planner is told -----------------------------------------------------------------------------

constexpr unsigned needs() {
  unsigned features = 0;
#if defined(__AVX2__)
  features |= kAvx2;
#endif
#if defined(__FMA__)
  features |= kFma;
#endif
#if defined(__F16C__)
  features |= kF16c;
#endif
#if defined(__AVX512F__)
  features |= kAvx512;
#endif
#if defined(__AVX512BF16__)
  features |= kAvx512Bf16;
#endif
#if defined(__AVX512VNNI__)
  features |= kAvx512Vnni;
#endif
#if defined(LSTM_EXT_TILES)
  features |= kTiles;
#endif
  return features;
}

constexpr LevelShape kShape{
    kVecBytes, kTileRows, kFullRows, kFactorsPerLane<Factor<BFloat16>> == 2, kNeighbours == 4, (needs() & kTiles) != 0};

// Whether the planner's view of an engine is what the engine is.
template <class Engine>
constexpr bool is_shape_of(Dtype dtype, bool backward, Storage storage = Storage::kPlain) {
  using C = typename Engine::C;
  using F = typename Engine::F;
  const EngineShape shape = engine_shape(kShape, Engine::kKind, dtype, backward, storage);
  bool same = shape.lanes == kLanes<C> && shape.sum_bytes == sizeof(C) && shape.tile_rows == Engine::kRows &&
              shape.row_planes == Engine::row_planes && shape.column_planes == Engine::planes &&
              shape.borrows_rows == Engine::kBorrowsRows;
  if (Engine::kKind == EngineKind::kVectors) {
    same = same && shape.factor_bytes == sizeof(F) && shape.full_rows == kFullRows;
  }
  for (int64_t K : {0, 1, 15, 16, 31, 32, 33, 64, 127, 1000}) {
    same = same && shape.row_bytes(K) == Engine::row_size(K) * static_cast<int64_t>(sizeof(F));
    same = same &&
           shape.panel_bytes(K) == Engine::weight_panel_size(K) * static_cast<int64_t>(sizeof(typename Engine::Packed));
    same =
        same && shape.unit_panels(K) == GateRows<C>{K}.panels() && shape.column_panels(K) == PlainRows<C>{K}.panels();
  }
  return same;
}

static_assert(is_shape_of<VectorEngine<float>>(Dtype::kFloat32, false));
static_assert(is_shape_of<VectorEngine<double>>(Dtype::kFloat64, false));
static_assert(is_shape_of<VectorEngine<BFloat16>>(Dtype::kBFloat16, false));
static_assert(is_shape_of<VectorEngine<Float16>>(Dtype::kFloat16, false));
static_assert(is_shape_of<HalfEngine>(Dtype::kFloat32, false, Storage::kBFloat16));
static_assert(is_shape_of<Int8Engine>(Dtype::kFloat32, false, Storage::kInt8));
static_assert(is_shape_of<VectorEngine<float>>(Dtype::kBFloat16, true));
static_assert(is_shape_of<VectorEngine<double>>(Dtype::kFloat64, true));
#if defined(LSTM_EXT_TILES)
static_assert(is_shape_of<TileEngine<float>>(Dtype::kFloat32, false));
static_assert(is_shape_of<TileEngine<BFloat16>>(Dtype::kBFloat16, false));
static_assert(is_shape_of<TileEngine<Float16>>(Dtype::kFloat16, false));
static_assert(is_shape_of<TileEngine<BFloat16, 3>>(Dtype::kBFloat16, true));
static_assert(is_shape_of<TileEngine<Float16, 3>>(Dtype::kFloat16, true));
#endif

// ---- a pass -----------------------------------------------------------------------------------------------

// The directions of a layer, run by a team. Forward, two directions divide the threads where there are two or more, as
// neither waits for the other; backward, one comes after the other, since the second adds to the first one's dx.
template <class Pass>
struct Call {
  Pass* direction[2];
  int directions;
  Barrier barrier[2];

  static void body(void* context, int rank, int size) {
    auto& call = *static_cast<Call*>(context);
    if (Pass::kDirectionsAtOnce && call.directions == 2 && size > 1) {
      const int half = size / 2;
      const int n = rank >= half;
      call.direction[n]->run({rank - n * half, n ? size - half : half, &call.barrier[n]});
    } else {
      for (int n = 0; n < call.directions; ++n) call.direction[n]->run({rank, size, &call.barrier[0]});
    }
  }
};

template <class Pass, class Layer, class... More>
void run_pass(const Layer& layer, const Plan& plan, More... more) {
  static_assert(std::is_trivially_destructible_v<Pass>);  // it lies in the arena
  Arena arena;
  const Walk walk(layer.shape, layer.masks, arena);
  Call<Pass> call{{}, layer.num_directions, {}};
  for (int n = 0; n < layer.num_directions; ++n) {
    call.direction[n] = new (arena.get<Pass>(1)) Pass(layer, n, plan, walk, arena, more...);
  }
  const int usable = layer.num_threads > plan.threads ? layer.num_threads : plan.threads;
  run_team(usable, plan.threads, Call<Pass>::body, &call);
}

// ---- the instance that a plan asks for ----------------------------------------------------------------------

// Whether this level multiplies in another way than the level that it is built on.
#if defined(LSTM_EXT_SIMD_BASE)
#if defined(LSTM_EXT_TILES)
constexpr EngineKind kOwnKind = EngineKind::kTiles;
#else
constexpr EngineKind kOwnKind = EngineKind::kVectors;
#endif
constexpr const Kernels* kBase = &LSTM_EXT_SIMD_BASE::kKernels;
template <class Engine>
constexpr bool kIsOwn = Engine::kKind == kOwnKind && !std::is_same_v<typename Engine::F, typename Engine::C>;
#else
constexpr const Kernels* kBase = nullptr;
template <class Engine>
constexpr bool kIsOwn = true;
#endif

template <class S>
struct ForwardBy {
  using Vectors = VectorEngine<S>;
#if defined(LSTM_EXT_TILES)
  using Tiles = TileEngine<S>;
#endif
  static constexpr auto kEntry = &Kernels::layer_forward;
  template <class Engine>
  static void run(const LayerForward& layer, const Plan& plan, int64_t first_step) {
    run_pass<Forward<S, Engine>>(layer, plan, first_step);
  }
};

template <class S>
struct PackBy {
  using Vectors = VectorEngine<S>;
#if defined(LSTM_EXT_TILES)
  using Tiles = TileEngine<S>;
#endif
  static constexpr auto kEntry = &Kernels::pack;
  template <class Engine>
  static void run(const LayerForward& layer, const Plan& plan) {
    Arena arena;
    const Walk walk(layer.shape, layer.masks, arena);
    for (int n = 0; n < layer.num_directions; ++n) Forward<S, Engine>(layer, n, plan, walk, arena, 0).pack();
  }
};

// Gradients are computed numbers, not stored ones: what they are multiplied by is widened, or cut into planes.
template <class S>
struct BackwardBy {
  using Vectors = VectorEngine<Compute<S>>;
#if defined(LSTM_EXT_TILES)
  using Tiles = TileEngine<S, kPlanes<float>>;
#endif
  static constexpr auto kEntry = &Kernels::layer_backward;
  template <class Engine>
  static void run(const LayerBackward& layer, const Plan& plan) {
    run_pass<Backward<S, Engine>>(layer, plan);
  }
};

template <class By, class Engine, class Layer, class... More>
void run_by(const Layer& layer, const Plan& plan, More... more) {
  if constexpr (kIsOwn<Engine>) {
    By::template run<Engine>(layer, plan, more...);
  } else {
    (kBase->*By::kEntry)(layer, plan);
  }
}

template <class By, class C, class Layer, class... More>
void run(const Layer& layer, const Plan& plan, More... more) {
#if defined(LSTM_EXT_TILES)
  if constexpr (std::is_same_v<C, float>) {
    if (plan.engine == EngineKind::kTiles) return run_by<By, typename By::Tiles>(layer, plan, more...);
  }
#endif
  run_by<By, typename By::Vectors>(layer, plan, more...);
}

template <template <class> class By, class Layer, class... More>
void run(const Layer& layer, const Plan& plan, More... more) {
  switch (layer.dtype) {
    case Dtype::kFloat32: return run<By<float>, float>(layer, plan, more...);
    case Dtype::kFloat64: return run<By<double>, double>(layer, plan, more...);
    case Dtype::kBFloat16: return run<By<BFloat16>, float>(layer, plan, more...);
    case Dtype::kFloat16: return run<By<Float16>, float>(layer, plan, more...);
  }
}

// Of a layer that may have other engines for its weights.
template <template <class> class By, class... More>
void run_stored(const LayerForward& layer, const Plan& plan, More... more) {
  switch (layer.storage) {
    case Storage::kPlain: return run<By>(layer, plan, more...);
    case Storage::kBFloat16: return run_by<By<float>, HalfEngine>(layer, plan, more...);
    case Storage::kInt8: return run_by<By<float>, Int8Engine>(layer, plan, more...);
  }
}

void pack(const LayerForward& layer, const Plan& plan) { run_stored<PackBy>(layer, plan); }

void layer_forward(const LayerForward& layer, const Plan& plan) {
  static thread_local int64_t steps_done = 0;
  run_stored<ForwardBy>(layer, plan, steps_done);
  steps_done += layer.shape.T;
}

void layer_backward(const LayerBackward& layer, const Plan& plan) { run<BackwardBy>(layer, plan); }

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels{LSTM_EXT_STRINGIFY(LSTM_EXT_SIMD_LEVEL), needs(), kShape, pack, layer_forward, layer_backward};

}  // namespace LSTM_EXT_SIMD_LEVEL
}  // namespace lstm_ext::cpu
