// Compiled once for each SIMD level (LSTM_EXT_SIMD_LEVEL names it), always from this one source.
#include "kernels.h"

#include <new>
#include <type_traits>

#include "backward.h"
#include "forward.h"

namespace lstm_ext::cpu {
namespace LSTM_EXT_SIMD_LEVEL {
namespace {

// Calls f with a value of the storage type that `dtype` stands for.
template <class F>
void with_storage(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat32: return f(float{});
    case Dtype::kFloat64: return f(double{});
    case Dtype::kBFloat16: return f(BFloat16{});
    case Dtype::kFloat16: return f(Float16{});
  }
}

// Waking a second thread costs some microseconds, and waiting for each other at every step some tenths of one: with
// less work than this one thread, or fewer of them, are faster.
constexpr double kLeastFlops = 6e5, kLeastFlopsPerStepAndMember = 5e4;

// How many of `threads` to use for directions at the same time, each of which has so much work at a step, done so many
// times as fast as vectors of floats would do it.
int threads_worth_having(int threads, const SequenceShape& shape, int directions, const StepWork& work, double speed) {
  const double step =
      8. * static_cast<double>(shape.B) * static_cast<double>(shape.H) * static_cast<double>(shape.I + shape.P) / speed;
  if (step * static_cast<double>(shape.T) < kLeastFlops) return 1;
  if (threads <= directions) return threads;
  const int each = threads / directions;
  if (Share({0, each, nullptr}, work).by_rows) return threads;
  const double members = step / kLeastFlopsPerStepAndMember;
  int64_t worth = members < each ? static_cast<int64_t>(members) : each;
  if (worth > work.panels) worth = work.panels;
  return directions * (worth > 1 ? static_cast<int>(worth) : 1);
}

template <class Pass>
struct ForwardCall {
  Pass* direction[2];
  int directions;
  Barrier barrier[2];

  // Two directions divide the threads where there are two or more: neither waits for the other.
  static void body(void* context, int rank, int size) {
    auto& call = *static_cast<ForwardCall*>(context);
    if (call.directions == 2 && size > 1) {
      const int half = size / 2;
      const int n = rank >= half;
      call.direction[n]->run({rank - n * half, n ? size - half : half, &call.barrier[n]});
    } else {
      for (int n = 0; n < call.directions; ++n) call.direction[n]->run({rank, size, &call.barrier[0]});
    }
  }
};

template <class Pass>
struct BackwardCall {
  Pass* direction[2];
  int directions;
  Barrier barrier;

  // One after the other: the second adds to the first one's dx.
  static void body(void* context, int rank, int size) {
    auto& call = *static_cast<BackwardCall*>(context);
    for (int n = 0; n < call.directions; ++n) call.direction[n]->run({rank, size, &call.barrier});
  }
};

template <class S, class Products>
void run_forward(const LayerForward& layer) {
  using Pass = Forward<S, Products>;
  static thread_local int64_t steps_done = 0;
  Arena arena;
  const Steps steps(layer.shape, layer.masks, arena);
  static_assert(std::is_trivially_destructible_v<Pass>);  // it lies in the arena
  ForwardCall<Pass> call{{}, layer.num_directions, {}};
  for (int n = 0; n < layer.num_directions; ++n) {
    call.direction[n] = new (arena.get<Pass>(1)) Pass(layer, layer.direction[n], steps, steps_done, arena);
  }
  const int threads = threads_worth_having(layer.num_threads, layer.shape, layer.num_directions,
                                           call.direction[0]->step_work(), Products::kSpeed);
  run_team(layer.num_threads, threads, ForwardCall<Pass>::body, &call);
  steps_done += layer.shape.T;
}

void layer_forward(const LayerForward& layer) {
  with_storage(layer.dtype, [&](auto storage) {
    using S = decltype(storage);
#if defined(LSTM_EXT_TILES)
    if constexpr (std::is_same_v<Compute<S>, float>) {
      if (tiles_pay<S>(layer.shape)) return run_forward<S, Tiles<S>>(layer);
    }
#endif
    run_forward<S, Vectors<S>>(layer);
  });
}

template <class S, class Products>
void run_backward(const LayerBackward& layer) {
  using Pass = Backward<S, Products>;
  Arena arena;
  const Steps steps(layer.shape, layer.masks, arena);
  static_assert(std::is_trivially_destructible_v<Pass>);
  BackwardCall<Pass> call{{}, layer.num_directions, {}};
  for (int n = 0; n < layer.num_directions; ++n) {
    call.direction[n] = new (arena.get<Pass>(1)) Pass(layer, layer.direction[n], steps, n > 0, arena);
  }
  const int threads =
      threads_worth_having(layer.num_threads, layer.shape, 1, call.direction[0]->step_work(), Products::kSpeed);
  run_team(layer.num_threads, threads, BackwardCall<Pass>::body, &call);
}

void layer_backward(const LayerBackward& layer) {
  with_storage(layer.dtype, [&](auto storage) {
    using S = decltype(storage);
#if defined(LSTM_EXT_TILES)
    if constexpr (std::is_same_v<Compute<S>, float>) {
      if (tiles_pay_backward<S>(layer.shape)) return run_backward<S, Tiles<S, kPlanes<float>>>(layer);
    }
#endif
    run_backward<S, Vectors<Compute<S>>>(layer);
  });
}

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels{LSTM_EXT_STRINGIFY(LSTM_EXT_SIMD_LEVEL), layer_forward, layer_backward};

}  // namespace LSTM_EXT_SIMD_LEVEL
}  // namespace lstm_ext::cpu
