// Layers whose weights do not change: packed once for the SIMD level in use, one call for all of them, and streams that
// keep their state between calls. `Frozen` may be used by many threads at once.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "../cpu/plan.h"
#include "layer_args.h"

namespace lstm_ext::ops {

struct FreeMemory {
  void operator()(void* memory) const;
};
using Memory = std::unique_ptr<void, FreeMemory>;

// One layer: its weights, and their packed copies.
class FrozenLayer : public LayerLayout {
 public:
  // `weights` and `cell` as in a LayerCall, in torch's layout; with kInt8 `scales` has those of w_ih [4H], w_hh [4H]
  // and, with a projection, w_hr [P], for each direction.
  FrozenLayer(const py::list& weights, const py::list& scales, std::optional<Cell> cell, Directions directions,
              Dtype dtype, Storage storage);

  // All of a pass but its sizes in time and batch, its arrays and its threads.
  const LayerForward& description() const { return description_; }
  int64_t bytes() const { return packed_bytes_ * D; }

 private:
  void read_scales(const py::list& scales, const Array& like);
  void pack();

  Array scales_[2][3];
  LayerCell own_cell_{};
  int64_t packed_bytes_ = 0;
  Memory packed_;
  LayerForward description_{};
};

class Frozen {
 public:
  // `layers` is a list of (weights, scales, cell), as FrozenLayer has them; `storage` "float32" for that of x's dtype,
  // "bfloat16" or "int8". Throws ValueError for another one, RuntimeError for arrays that do not fit each other.
  Frozen(const py::list& layers, Directions directions, const std::string& dtype, const std::string& storage);

  // `call` has no weights and no cell; its state is that of all layers. -> (y, h_n, c_n); of a step (h, None, c)
  py::object run(const LayerCall& call, int num_threads) const;

  // How the layers would run -> a list of what cpu_plan gives.
  py::list plans(int64_t T, int64_t B, int num_threads) const;
  int64_t bytes() const;  // of the packed weights

 private:
  friend class Stream;
  struct Io;
  struct Rounds;
  LayerArgs arguments(const LayerCall& call) const;
  LayerForward describe(const LayerArgs& args, const Io& io, size_t n) const;
  LayerForward in_stack(const LayerArgs& args, const Io& io, size_t n, char* between, int64_t half) const;
  // So many bytes of memory that grows where it is too small.
  static void* scratch(Memory& memory, size_t& bytes, int64_t wanted_bytes);
  void forward(const LayerArgs& args, const Io& io, Memory& memory, size_t& memory_bytes) const;
  const FrozenLayer& last() const { return *layers_.back(); }

  std::vector<std::unique_ptr<FrozenLayer>> layers_;  // a description points into its layer
};

// The state of some sequences, which go on with each call. One caller's at a time.
class Stream {
 public:
  // `states` are h [L, B, P] and c [L, B, H] now, and two arrays more for those of the next call.
  Stream(std::shared_ptr<const Frozen> frozen, const py::tuple& states);

  // A step, or a block of them: y, written to `out` if that is not None. Throws RuntimeError if another thread is in
  // it.
  py::object step(const py::object& x, bool batch_first, const py::object& out, const py::object& lengths,
                  const py::object& resets, int num_threads);

  // Which pair of the arrays has the state now: 0 or 1.
  int current() const { return current_; }
  // Between these two no call may come in. Throws as `step` does.
  void hold();
  void release() { busy_.store(false, std::memory_order_release); }

 private:
  struct Held;

  std::shared_ptr<const Frozen> frozen_;
  Array h_[2], c_[2];
  int current_ = 0;
  int64_t batch_size_ = 0;
  std::atomic<bool> busy_{false};
  Memory between_;  // layers
  size_t between_bytes_ = 0;
};

}  // namespace lstm_ext::ops
