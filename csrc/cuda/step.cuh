// One step of a layer in a launch, two with a projection: nothing needs to fit on chip. A block takes a tile of rows of
// the weights and sequences (step_tile.cuh), of a large k with others of its cluster, and then the pointwise part of
// the units of the tile. What lets a launch begin while the one before it still runs:
//
//   launch s      rows and weights of the first stages | wait |  operand, product  | sums | pointwise
//   launch s + 1                                                rows and weights of the first ...    | wait | ...
//
// A launch has waited before it reads what an earlier one wrote, or writes.
#pragma once

#include "cell.cuh"
#include "step_block.cuh"

namespace lstm_ext::cuda {

#if defined(__CUDA_ARCH__)
inline constexpr int kCapability = __CUDA_ARCH__ / 10;
#else
inline constexpr int kCapability = 0;
#endif
template <class Tile, int kBatchTiles>
inline constexpr int kStepBlocks =
    step_blocks(Tile::kRowTiles, kBatchTiles, sizeof(typename Tile::Number), kCapability);

// Adjacent units that a thread finishes together: the instructions around a unit are the same for two of them.
template <class Tile>
inline constexpr int kStepItem = sizeof(typename Tile::Sum) == 4 ? 2 : 1;

// Asks for the four gates of a unit.
template <class T>
__device__ __forceinline__ void prefetch_gates(const T* unit, int64_t H) {
  for (int gate = 0; gate < 4; ++gate) prefetch_to_l2(unit + gate * H);
}

// Where the states of a thread's units lie between the launches, or the gradients of these: [D, B, width].
template <class T, class Block>
class States {
 public:
  __device__ __forceinline__ States(void* states, const Block& block, int d, int64_t B, int64_t width)
      : first_(static_cast<T*>(states) + (d * B + block.sequence(0)) * width + block.unit()),
        width_(static_cast<uint32_t>(width)) {}

  // Of the block's sequence n.
  __device__ __forceinline__ T* at(int n) const { return first_ + uint64_t{static_cast<uint32_t>(n)} * width_; }

 private:
  T* first_;
  uint32_t width_;
};

// ---- Forward --------------------------------------------------------------------------------------------------
//
// `Params` is StepForward, or WithCell of it.

template <class Params>
inline constexpr bool kHasOptions = false;
template <class Params>
inline constexpr bool kHasOptions<WithCell<Params>> = true;

// Where a launch stores what it makes of a sequence, and finds what x has given to its gates; null where nothing is.
template <class Tile>
struct alignas(16) StepForwardRows {
  static constexpr int kMoments = 1;
  ForwardRows<Tile> stored;
  const typename Tile::Sum* xw;
};

template <class Tile>
__device__ __forceinline__ StepForwardRows<Tile> step_rows(const StepForward& params, int d, const Moment& moment,
                                                           int64_t b) {
  using Rows = StepForwardRows<Tile>;
  if (params.s < 0) return {};
  const LayerForward& layer = params.layer;
  Rows rows{forward_rows<Tile>(layer, layer.direction[d], moment, b), nullptr};
  if (moment.active() && params.xw[d])
    rows.xw = element<typename Tile::Sum>(params.xw[d], layer.gates_map, moment.start, b, 0);
  return rows;
}

// h of all sequences as step s of a cell with recurrent dropout multiplies it.
template <class Tile>
__device__ __forceinline__ typename Tile::Number* multiplied_h(const WithCell<StepForward>& params, int64_t s, int d,
                                                               int64_t b) {
  const SequenceShape& shape = params.layer.shape;
  const int64_t row = (s % 2 * params.layer.num_directions + d) * shape.B + b;
  return static_cast<typename Tile::Number*>(params.cell.h_state) + row * shape.P;
}

// The matrices that a launch multiplies, in one loop so that its code stands there once: w_ih with x, if that is given,
// and then w_hh with h; or w_hr with the hidden units that the launch before has left in memory.
template <class Tile, class Params, class Block>
__device__ __forceinline__ void step_products(const Params& params, Block& block, int d) {
  using Number = typename Tile::Number;
  const LayerForward& layer = params.layer;
  const SequenceShape& shape = layer.shape;
  const ForwardDirection& to = layer.direction[d];
  const bool projection = params.part.product == Product::kProjection;
  const bool has_h = projection || params.s > 0 || to.state.h0.data;
  for (int pass = !projection && layer.x ? 0 : 1; pass < (has_h ? 2 : 1); ++pass) {
    const bool of_x = pass == 0;
    const auto row_of = [&](int n) -> const Number* {
      const Moment& moment = block.moment(n);
      const int64_t b = block.sequence(n);
      if (projection) return static_cast<const Number*>(params.hidden) + (d * shape.B + b) * shape.H;
      if (of_x) return element<Number>(layer.x, layer.x_map, moment.start, b, 0);
      if (!moment.active() || moment.forgets()) return nullptr;
      if constexpr (kHasOptions<Params>) {
        if (params.cell.h_state) return multiplied_h<Tile>(params, params.s, d, b);
      }
      if (params.s == 0) return static_cast<const Number*>(to.state.h0.data) + b * to.state.h0.row_stride;
      return element<Number>(static_cast<const void*>(to.y), layer.y_map, moment.start_before, b, 0);
    };
    block.add(projection ? to.weights.w_hr
              : of_x     ? to.weights.w_ih
                         : to.weights.w_hh,
              projection ? shape.H
              : of_x     ? shape.I
                         : shape.P,
              row_of);
  }
}

template <class Tile>
__device__ __forceinline__ Place place_of(const WithCell<StepForward>& params, const Moment& moment, int d, int64_t b,
                                          int64_t unit) {
  const LayerForward& layer = params.layer;
  return {CellStep<Tile, false>::time_of(moment, layer.gates_map, layer.masks, layer.shape.T,
                                         layer.direction[d].reverse, params.s, b),
          b, unit};
}

// h of a cell with options as step s leaves it, from what the step has computed; and as the next step multiplies it.
template <class Tile>
__device__ __forceinline__ typename Tile::Sum step_h(const WithCell<StepForward>& params, const Moment& moment,
                                                     const Place& at, int d, typename Tile::Sum computed) {
  using Number = typename Tile::Number;
  using Sum = typename Tile::Sum;
  if (!moment.active()) return 0;
  const LayerForward& layer = params.layer;
  const ForwardDirection& to = layer.direction[d];
  const CellStep<Tile, false> step(params.cell, d);
  Sum before = 0;
  if (step.keeps_h() && !moment.forgets())
    before =
        params.s == 0
            ? state_at<Number>(to.state.h0, at.b, at.unit)
            : widen(*element<Number>(static_cast<const void*>(to.y), layer.y_map, moment.start_before, at.b, at.unit));
  const Sum h = step.output(at, layer.shape.projected, before, computed);
  if (params.cell.h_state)
    multiplied_h<Tile>(params, params.s + 1, d, at.b)[at.unit] = narrow<Number>(h * step.h_mask(at));
  return h;
}

// Product::kRecurrent: the pointwise part from the gates' sums. Without a projection this is all.
template <class Tile, class Params, class Block>
__device__ __forceinline__ void step_gates(const Params& params, Block& block, int d) {
  constexpr bool kOptions = kHasOptions<Params>;
  constexpr int kItem = Block::kItem;
  using Number = typename Tile::Number;
  using Sum = typename Tile::Sum;
  using Sums = Units<Sum, kItem>;
  const LayerForward& layer = params.layer;
  const ForwardDirection& to = layer.direction[d];
  const int64_t B = layer.shape.B, H = layer.shape.H, s = params.s, unit = block.unit();
  const int valid = block.valid(), width = params.part.rows.width;
  const States<Sum, Block> c_states(params.state, block, d, B, H);
  const States<Number, Block> hidden(params.hidden, block, d, B, H);
  Pre<Tile> bias[kItem] = {};
  GateValues<Sum> peephole[kItem] = {};
#pragma unroll
  for (int i = 0; i < kItem; ++i) {
    if (i >= valid) break;
    if constexpr (kOptions) {
      bias[i] = cell_bias_of<Tile>(to.weights, H, unit + i);
      peephole[i] = CellStep<Tile, false>(params.cell, d).peephole(unit + i);
    } else {
      bias[i] = bias_of<Tile>(to.weights, H, unit + i);
    }
  }
  struct Loaded {
    Sums c;
    GateValues<Stored<Sum, kItem>> xw;
  };
  const auto load = [&](int n) {
    Loaded loaded{};
    loaded.c = s == 0 ? units_of_state<kItem, Number>(to.state.c0, block.sequence(n), unit, valid)
                      : load_units<kItem>(c_states.at(n), valid);
    const Sum* xw = block.rows(n).xw;
    if (xw) loaded.xw = load_gates<kItem>(xw + unit, H, valid);
    return loaded;
  };
  const auto finish = [&](int n, int j, const Loaded& loaded) {
    const Moment& moment = block.moment(n);
    const int64_t b = block.sequence(n);
    if (s == 0 && length_of(layer.masks, layer.shape.T, b) == 0)
      store_units(static_cast<Number*>(to.c_n) + b * H + unit, loaded.c, valid);
    const Units<Sums, 4> h = block.template product<4>(n, j, width);
    Units<CellState<Sum>, kItem> cells;
    Sums out, after;
#pragma unroll
    for (int i = 0; i < kItem; ++i) {
      const Sum c = moment.forgets() ? 0 : loaded.c.at[i];
      const Pre<Tile> of_h{h.at[0].at[i], h.at[1].at[i], h.at[2].at[i], h.at[3].at[i]};
      const Pre<Tile> pre = plus(gates_of<Sum, kItem>(loaded.xw, i), plus(of_h, bias[i]));
      if constexpr (kOptions) {
        static_assert(kItem == 1);
        const CellStep<Tile, false> step(params.cell, d);
        const Place at = place_of<Tile>(params, moment, d, b, unit);
        cells = step.template forward<1>(moment, at, {{peephole[0]}}, {{pre}}, {{c}}, out);
        if (!layer.shape.projected) out.at[0] = step_h<Tile>(params, moment, at, d, out.at[0]);
      } else {
        cells.at[i] = forward_cell<Tile>(moment, pre, c);
        out.at[i] = moment.active() ? cell_output<typename Tile::Math>(cells.at[i].gates.o, cells.at[i].c) : 0;
      }
      after.at[i] = carried(moment, cells.at[i].c);
    }
    const ForwardRows<Tile> rows = block.rows(n).stored;
    store_cells(layer, to, rows, moment, b, unit, stored_cells<Tile>(cells), valid);
    if (params.state) store_units(c_states.at(n), after, valid);
    if (params.hidden) {
      store_units(hidden.at(n), out, valid);
    } else {
      store_output(layer, to, rows, moment, b, unit, narrow_units<Number>(out), valid);
    }
  };
  block.template finish_items<Loaded>(load, finish);
}

// Product::kProjection: h.
template <class Tile, class Params, class Block>
__device__ __forceinline__ void step_projection(const Params& params, Block& block, int d) {
  const LayerForward& layer = params.layer;
  const ForwardDirection& to = layer.direction[d];
  struct Nothing {};
  block.template finish_items<Nothing>(
      [](int) { return Nothing(); },
      [&](int n, int j, Nothing) {
        const Moment& moment = block.moment(n);
        const int64_t b = block.sequence(n), p = block.unit();
        auto h = block.product(n, j).at[0];
        if constexpr (kHasOptions<Params>) {
#pragma unroll
          for (int i = 0; i < Block::kItem; ++i)
            h.at[i] = step_h<Tile>(params, moment, place_of<Tile>(params, moment, d, b, p + i), d, h.at[i]);
        }
        store_output(layer, to, block.rows(n).stored, moment, b, p, narrow_units<typename Tile::Number>(h),
                     block.valid());
      });
}

// A sequence of length 0 ends with the h that it starts from.
template <class Tile>
__device__ void keep_initial_h(const LayerForward& layer, const ForwardDirection& to, int64_t b, int64_t p) {
  using Number = typename Tile::Number;
  if (length_of(layer.masks, layer.shape.T, b) == 0)
    static_cast<Number*>(to.h_n)[b * layer.shape.P + p] = narrow<Number>(state_at<Number>(to.state.h0, b, p));
}

// By a block that takes the whole launch.
template <class Tile, class Params, class Block>
__device__ __forceinline__ void take_step_forward(const Params& params, Block& block, int d) {
  const LayerForward& layer = params.layer;
  const bool gates = params.part.product == Product::kRecurrent;
  if (gates && params.xw[d]) {
    block.for_items([&](int n) {
      const auto* xw = block.rows(n).xw;
      if (xw) prefetch_gates(xw + block.unit(), layer.shape.H);
    });
  }
  step_products<Tile>(params, block, d);
  block.follow_previous_launch();
  const bool makes_h = !gates || !params.hidden;
  if (makes_h && params.s == 0) {
    block.for_units([&](int n, int64_t p) { keep_initial_h<Tile>(layer, layer.direction[d], block.sequence(n), p); });
  }
  if (gates) {
    step_gates<Tile>(params, block, d);
  } else {
    step_projection<Tile>(params, block, d);
  }
}

template <class Tile, int kBatchTiles>
__global__ void __launch_bounds__(kThreads, kStepBlocks<Tile, kBatchTiles>)
    step_forward(const __grid_constant__ StepForward params) {
  const int d = blockIdx.y;
  const LayerForward& layer = params.layer;
  const auto rows_of = [&](const Moment& moment, int64_t b) { return step_rows<Tile>(params, d, moment, b); };
  StepBlock<Tile, kBatchTiles, false, StepForwardRows<Tile>, kStepItem<Tile>> block(
      params.part, layer.shape, layer.masks, layer.gates_map.packed_offset, layer.direction[d].reverse, params.s,
      rows_of);
  take_step_forward<Tile>(params, block, d);
}

template <class Tile, int kBatchTiles, bool kTensorflow>
__global__ void __launch_bounds__(kThreads, 1) cell_step_forward(const __grid_constant__ WithCell<StepForward> params) {
  const int d = blockIdx.y;
  const LayerForward& layer = params.layer;
  const auto rows_of = [&](const Moment& moment, int64_t b) { return step_rows<Tile>(params, d, moment, b); };
  StepBlock<Tile, kBatchTiles, kTensorflow, StepForwardRows<Tile>, 1, kTensorflow> block(
      params.part, layer.shape, layer.masks, layer.gates_map.packed_offset, layer.direction[d].reverse, params.s,
      rows_of);
  if (params.s >= 0) return take_step_forward<Tile>(params, block, d);
  const CellStep<Tile, false> step(params.cell, d);
  block.for_units([&](int n, int64_t p) {
    const int64_t b = block.sequence(n);
    const auto h0 = state_at<typename Tile::Number>(layer.direction[d].state.h0, b, p);
    multiplied_h<Tile>(params, 0, d, b)[p] = narrow<typename Tile::Number>(h0 * step.h_mask({0, b, p}));
  });
}

// ---- Backward -------------------------------------------------------------------------------------------------
//
// `Params` is StepBackward, or WithCell of it.

// Where a launch finds what the forward pass and the caller know of a sequence; null where nothing is.
template <class Tile>
struct BackwardReads {
  const typename Tile::Number *gates, *dy;
  const typename Tile::Sum *cells, *cells_before, *d_cells;
};

// The first is that of gates: null where the step is not active.
template <class Tile>
__device__ __forceinline__ BackwardReads<Tile> backward_reads(const StepBackward& params, int d, const Moment& moment,
                                                              int64_t b) {
  using Number = typename Tile::Number;
  using Sum = typename Tile::Sum;
  const LayerBackward& layer = params.pass.layer;
  const BackwardDirection& from = layer.direction[d];
  BackwardReads<Tile> reads{};
  if (!moment.active()) return reads;
  reads.gates = element<Number>(from.gates, layer.gates_map, moment.start, b, 0);
  reads.cells = element<Sum>(from.cells, layer.cells_map, moment.start, b, 0);
  if (params.s > 0 && !moment.forgets())
    reads.cells_before = element<Sum>(from.cells, layer.cells_map, moment.start_before, b, 0);
  if (from.dy) reads.dy = element<Number>(from.dy, layer.dy_map, moment.start, b, 0);
  if (from.d_cells) reads.d_cells = element<Sum>(from.d_cells, layer.d_cells_map, moment.start, b, 0);
  return reads;
}

// The same, and where it stores what it makes of the sequence.
template <class Tile>
struct alignas(16) StepBackwardRows {
  static constexpr int kMoments = 2;
  BackwardReads<Tile> read;
  BackwardRows<Tile> stored;
};

template <class Tile, class Params>
__device__ __forceinline__ StepBackwardRows<Tile> step_rows_back(const Params& params, int d, const Moment& moment,
                                                                 int64_t b) {
  if (params.s < 0) return {};
  return {backward_reads<Tile>(params, d, moment, b),
          backward_rows<Tile, kHasOptions<Params>>(params.pass, d, moment, b)};
}

// What the pointwise part reads of them.
template <class Tile>
__device__ __forceinline__ void prefetch_backward(const BackwardReads<Tile>& reads, const SequenceShape& shape,
                                                  int64_t unit) {
  if (!reads.gates) return;
  prefetch_gates(reads.gates + unit, shape.H);
  prefetch_to_l2(reads.cells + unit);
  if (reads.cells_before) prefetch_to_l2(reads.cells_before + unit);
  if (reads.dy && !shape.projected) prefetch_to_l2(reads.dy + unit);
}

template <class Tile>
__device__ __forceinline__ Place place_of(const WithCell<StepBackward>& params, const Moment& moment, int d, int64_t b,
                                          int64_t unit) {
  const LayerBackward& layer = params.pass.layer;
  return {CellStep<Tile, false>::time_of(moment, layer.gates_map, layer.masks, layer.shape.T,
                                         layer.direction[d].reverse, params.s, b),
          b, unit};
}

// What of the gradient of h went past the step after this one.
template <class Tile>
__device__ __forceinline__ typename Tile::Sum& kept_d_h(const WithCell<StepBackward>& params, int d, int64_t b,
                                                        int64_t p) {
  const SequenceShape& shape = params.pass.layer.shape;
  return static_cast<typename Tile::Sum*>(params.cell.h_state)[(d * shape.B + b) * shape.P + p];
}

// The gradient of h that comes back to a step of a cell with options, from that of what the next step multiplied.
template <class Tile>
__device__ __forceinline__ typename Tile::Sum d_h_of_cell(const WithCell<StepBackward>& params, int d, int64_t b,
                                                          int64_t p, typename Tile::Sum product) {
  typename Tile::Sum d_h = product;
  d_h *= CellStep<Tile, false>(params.cell, d).h_mask({0, b, p});
  if (params.cell.h_state && params.s + 1 < params.pass.layer.shape.T) d_h += kept_d_h<Tile>(params, d, b, p);
  return d_h;
}

// From the gradient of h that a step left to that of what it computed; what is known of h then is stored.
template <class Tile>
__device__ __forceinline__ typename Tile::Sum cell_output_backward(const WithCell<StepBackward>& params,
                                                                   const BackwardRows<Tile>& rows, const Moment& moment,
                                                                   int d, int64_t b, int64_t p,
                                                                   typename Tile::Sum d_h) {
  using Number = typename Tile::Number;
  using Sum = typename Tile::Sum;
  const BackwardPass& pass = params.pass;
  const CellStep<Tile, false> step(params.cell, d);
  Sum kept;
  d_h = step.output_backward(moment, place_of<Tile>(params, moment, d, b, p), pass.layer.shape.projected, d_h, kept);
  if (params.cell.h_state) kept_d_h<Tile>(params, d, b, p) = kept;
  const Units<Sum, 1> before = step.template h_before<1>(pass.layer.direction[d].state, moment, params.s, {0, b, p}, 1);
  store_cell_output_grads(pass, d, rows, moment, b, p, before, Units<Number, 1>{{narrow<Number>(d_h)}}, 1);
  return d_h;
}

// What the pointwise part of N units reads, as it is stored: to widen it would be to wait for it.
template <class Tile, int N>
struct CellBackwardLoaded {
  using Number = typename Tile::Number;
  using Sum = typename Tile::Sum;
  GateValues<Stored<Number, N>> gates;
  Stored<Number, N> dy;
  Units<Sum, N> c, c_prev, d_cells, d_c;

  __device__ __forceinline__ BackwardInputs<Sum> inputs(int i) const {
    return {widen_gates(gates_of<Number, N>(gates, i)), c.at[i], c_prev.at[i], d_cells.at[i]};
  }
  __device__ __forceinline__ Sum dy_of(int i) const { return widen(bits_as<Units<Number, N>>(dy).at[i]); }
};

// All but dy. `d_c` is where their gradients of c are, for the later steps; c0 is read where the walk begins.
template <class Tile, int N>
__device__ __forceinline__ CellBackwardLoaded<Tile, N> load_cell_backward(const StepBackward& params,
                                                                          const BackwardReads<Tile>& reads,
                                                                          const Moment& moment, int d, int64_t b,
                                                                          int64_t unit, int valid,
                                                                          const typename Tile::Sum* d_c) {
  const SequenceShape& shape = params.pass.layer.shape;
  CellBackwardLoaded<Tile, N> loaded{};
  if (params.s + 1 < shape.T) loaded.d_c = load_units<N>(d_c, valid);
  if (!reads.gates) return loaded;
  loaded.gates = load_gates<N>(reads.gates + unit, shape.H, valid);
  loaded.c = load_units<N>(reads.cells + unit, valid);
  if (reads.cells_before) {
    loaded.c_prev = load_units<N>(reads.cells_before + unit, valid);
  } else if (!moment.forgets()) {
    const Matrix& c0 = params.pass.layer.direction[d].state.c0;
    loaded.c_prev = units_of_state<N, typename Tile::Number>(c0, b, unit, valid);
  }
  if (reads.d_cells) loaded.d_cells = load_units<N>(reads.d_cells + unit, valid);
  return loaded;
}

// The pointwise part of sequence n from the gradients of h; those of c stay in memory for the next launch.
template <class Tile, class Params, class Block, int N>
__device__ __forceinline__ void step_cell_backward(const Params& params, const Block& block, int d, int n,
                                                   const Units<typename Tile::Sum, N>& d_h,
                                                   const CellBackwardLoaded<Tile, N>& loaded,
                                                   typename Tile::Sum* d_c_state) {
  constexpr bool kOptions = kHasOptions<Params>;
  static_assert(!kOptions || N == 1);
  using Number = typename Tile::Number;
  using Sum = typename Tile::Sum;
  const LayerBackward& layer = params.pass.layer;
  const BackwardDirection& from = layer.direction[d];
  const SequenceShape& shape = layer.shape;
  const Moment& moment = block.moment(n);
  const int64_t b = block.sequence(n), unit = block.unit();
  const int valid = block.valid();
  Units<Sum, N> d_c = loaded.d_c;
  Units<BackwardCell<Sum>, N> cells;
  if constexpr (kOptions) {
    const CellStep<Tile, false> step(params.cell, d);
    cells = step.template backward<1>(from, moment, place_of<Tile>(params, moment, d, b, unit), {{step.peephole(unit)}},
                                      params.pass.hidden_map, {{loaded.inputs(0)}}, d_h, d_c, valid);
  } else {
    if (moment.active() && moment.last()) d_c = units_of_state<N, Number>(from.dc_n, b, unit, valid);
#pragma unroll
    for (int i = 0; i < N; ++i) cells.at[i] = backward_cell<Tile>(moment, loaded.inputs(i), d_h.at[i], d_c.at[i]);
  }
  store_cell_grads<Tile, kOptions>(params.pass, d, block.rows(n).stored, moment, params.s, b, unit,
                                   stored_grads<Tile>(cells), valid);
  store_units(d_c_state, d_c, valid);
  if (params.s > 0 || !from.dc0) return;
  if (length_of(layer.masks, shape.T, b) == 0) d_c = units_of_state<N, Number>(from.dc_n, b, unit, valid);
  store_units(static_cast<Number*>(from.dc0) + b * shape.H + unit, d_c, valid);
}

// What a launch multiplies: w_hh' with the gates' gradients of step s + 1, or w_hr' with the gradient of h, which the
// launch before has left in d_h.
template <class Tile, class Params, class Block>
__device__ __forceinline__ void step_products_backward(const Params& params, Block& block, int d) {
  using Number = typename Tile::Number;
  const BackwardPass& pass = params.pass;
  const SequenceShape& shape = pass.layer.shape;
  const LayerWeights& weights = pass.layer.direction[d].weights;
  const bool projection = params.part.product == Product::kProjection;
  if (!projection && params.s + 1 == shape.T) return;
  const auto row_of = [&](int n) -> const Number* {
    const Moment &moment = block.moment(n), &next = block.next_moment(n);
    const int64_t b = block.sequence(n);
    const void *d_h = pass.outputs[d].d_h, *d_gates = pass.outputs[d].d_gates;
    if (projection) return moment.active() ? element<Number>(d_h, pass.h_map, moment.start, b, 0) : nullptr;
    return next.active() && !next.forgets() ? element<Number>(d_gates, pass.d_gates_map, next.start, b, 0) : nullptr;
  };
  block.add(projection ? weights.w_hr : weights.w_hh, projection ? shape.P : 4 * shape.H, row_of);
}

// The gradient of h after step s, and without a projection on to the gates'.
template <class Tile, class Params, class Block>
__device__ __forceinline__ void step_h_backward(const Params& params, Block& block, int d) {
  using Number = typename Tile::Number;
  using Sum = typename Tile::Sum;
  const BackwardPass& pass = params.pass;
  const BackwardDirection& from = pass.layer.direction[d];
  const SequenceShape& shape = pass.layer.shape;
  const bool makes_cells = params.s >= 0 && !shape.projected;
  constexpr bool kOptions = kHasOptions<Params>;
  constexpr int kItem = Block::kItem;
  using Sums = Units<Sum, kItem>;
  using Loaded = CellBackwardLoaded<Tile, kItem>;
  const int64_t p = block.unit();
  const int valid = block.valid();
  const States<Sum, Block> d_c_states(params.state, block, d, shape.B, shape.H);
  const auto load = [&](int n) {
    if (params.s < 0) return Loaded{};
    const BackwardReads<Tile>& reads = block.rows(n).read;
    Loaded loaded{};
    if (makes_cells)
      loaded = load_cell_backward<Tile, kItem>(params, reads, block.moment(n), d, block.sequence(n), p, valid,
                                               d_c_states.at(n));
    if (reads.dy) loaded.dy = load_units<kItem>(reads.dy + p, valid);
    return loaded;
  };
  block.template finish_items<Loaded>(load, [&](int n, int j, const Loaded& loaded) {
    const int64_t b = block.sequence(n);
    Sums d_h = block.product(n, j).at[0];
    if constexpr (kOptions) d_h.at[0] = d_h_of_cell<Tile>(params, d, b, p, d_h.at[0]);
    if (params.s < 0) {
      if (length_of(pass.layer.masks, shape.T, b) == 0) d_h = units_of_state<kItem, Number>(from.dh_n, b, p, valid);
      return store_units(static_cast<Number*>(from.dh0) + b * shape.P + p, d_h, valid);
    }
    const Moment& moment = block.moment(n);
    const BackwardRows<Tile>& rows = block.rows(n).stored;
    Sums of_last{};
    if (moment.active() && moment.last()) of_last = units_of_state<kItem, Number>(from.dh_n, b, p, valid);
#pragma unroll
    for (int i = 0; i < kItem; ++i) d_h.at[i] = moment.active() ? d_h.at[i] + loaded.dy_of(i) + of_last.at[i] : 0;
    if constexpr (kOptions) {
      d_h.at[0] = cell_output_backward<Tile>(params, rows, moment, d, b, p, d_h.at[0]);
    } else {
      store_output_grads(pass, d, rows, moment, params.s, b, p, narrow_units<Number>(d_h), valid);
    }
    if (makes_cells) step_cell_backward<Tile>(params, block, d, n, d_h, loaded, d_c_states.at(n));
  });
}

// Product::kProjection: from the gradient of the hidden units to the gates'.
template <class Tile, class Params, class Block>
__device__ __forceinline__ void step_hidden_backward(const Params& params, Block& block, int d) {
  constexpr int kItem = Block::kItem;
  using Loaded = CellBackwardLoaded<Tile, kItem>;
  const SequenceShape& shape = params.pass.layer.shape;
  const States<typename Tile::Sum, Block> d_c_states(params.state, block, d, shape.B, shape.H);
  const auto load = [&](int n) {
    return load_cell_backward<Tile, kItem>(params, block.rows(n).read, block.moment(n), d, block.sequence(n),
                                           block.unit(), block.valid(), d_c_states.at(n));
  };
  block.template finish_items<Loaded>(load, [&](int n, int j, const Loaded& loaded) {
    step_cell_backward<Tile>(params, block, d, n, block.product(n, j).at[0], loaded, d_c_states.at(n));
  });
}

// By a block that takes the whole launch.
template <class Tile, class Params, class Block>
__device__ __forceinline__ void take_step_backward(const Params& params, Block& block, int d) {
  const LayerBackward& layer = params.pass.layer;
  const bool recurrent = params.part.product == Product::kRecurrent;
  if (params.s >= 0 && recurrent != layer.shape.projected) {
    block.for_items([&](int n) { prefetch_backward(block.rows(n).read, layer.shape, block.unit()); });
  }
  step_products_backward<Tile>(params, block, d);
  block.follow_previous_launch();
  if (recurrent) {
    step_h_backward<Tile>(params, block, d);
  } else {
    step_hidden_backward<Tile>(params, block, d);
  }
}

template <class Tile, int kBatchTiles>
__global__ void __launch_bounds__(kThreads, kStepBlocks<Tile, kBatchTiles>)
    step_backward(const __grid_constant__ StepBackward params) {
  const int d = blockIdx.y;
  const LayerBackward& layer = params.pass.layer;
  const auto rows_of = [&](const Moment& moment, int64_t b) { return step_rows_back<Tile>(params, d, moment, b); };
  StepBlock<Tile, kBatchTiles, true, StepBackwardRows<Tile>, kStepItem<Tile>> block(
      params.part, layer.shape, layer.masks, layer.gates_map.packed_offset, layer.direction[d].reverse, params.s,
      rows_of);
  take_step_backward<Tile>(params, block, d);
}

template <class Tile, int kBatchTiles, bool kTensorflow>
__global__ void __launch_bounds__(kThreads, 1)
    cell_step_backward(const __grid_constant__ WithCell<StepBackward> params) {
  const int d = blockIdx.y;
  const LayerBackward& layer = params.pass.layer;
  const auto rows_of = [&](const Moment& moment, int64_t b) { return step_rows_back<Tile>(params, d, moment, b); };
  StepBlock<Tile, kBatchTiles, !kTensorflow, StepBackwardRows<Tile>> block(
      params.part, layer.shape, layer.masks, layer.gates_map.packed_offset, layer.direction[d].reverse, params.s,
      rows_of);
  take_step_backward<Tile>(params, block, d);
}

}  // namespace lstm_ext::cuda
