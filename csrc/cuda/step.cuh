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

// Blocks that a multiprocessor holds at a time: two, where 128 registers are enough for the sums and what goes with
// them. From sm_100 on they are not for numbers of 4 bytes, and nowhere for two batch tiles without tensor cores.
#if __CUDA_ARCH__ >= 1000
inline constexpr int kMostBytesOfTwoBlocks = 2;
#else
inline constexpr int kMostBytesOfTwoBlocks = 4;
#endif
template <class Tile, int kBatchTiles>
inline constexpr int kStepBlocks =
    kBatchTiles < (Tile::kRowTiles == 2 ? 8 : 2) && sizeof(typename Tile::Number) <= kMostBytesOfTwoBlocks ? 2 : 1;

// Asks for the four gates of a unit.
template <class T>
__device__ __forceinline__ void prefetch_gates(const void* gates, const RowMap& map, int64_t start, int64_t b,
                                               int64_t H, int64_t unit) {
  const T* at = element<T>(gates, map, start, b, unit);
  for (int gate = 0; gate < 4; ++gate) prefetch_to_l2(at + gate * H);
}

// ---- Forward --------------------------------------------------------------------------------------------------
//
// `Params` is StepForward, or WithCell of it.

template <class Params>
inline constexpr bool kHasOptions = false;
template <class Params>
inline constexpr bool kHasOptions<WithCell<Params>> = true;

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
  using Number = typename Tile::Number;
  using Sum = typename Tile::Sum;
  const LayerForward& layer = params.layer;
  const ForwardDirection& to = layer.direction[d];
  const int64_t H = layer.shape.H, s = params.s;
  const auto c_of = [&](int64_t b, int64_t unit) {
    return static_cast<Sum*>(params.state) + (d * layer.shape.B + b) * H + unit;
  };
  Pre<Tile> bias{};
  GateValues<Sum> peephole{};
  if (block.has_unit()) {
    if constexpr (kOptions) {
      bias = cell_bias_of<Tile>(to.weights, H, block.unit());
      peephole = CellStep<Tile, false>(params.cell, d).peephole(block.unit());
    } else {
      bias = bias_of<Tile>(to.weights, H, block.unit());
    }
  }
  struct Loaded {
    Sum c;
    Pre<Tile> xw;
  };
  const auto load = [&](int n, int64_t unit) {
    const Moment& moment = block.moment(n);
    const int64_t b = block.sequence(n);
    Loaded loaded{s == 0 ? state_at<Number>(to.state.c0, b, unit) : *c_of(b, unit), {}};
    if (moment.active() && params.xw[d])
      loaded.xw = read_gates<Sum>(params.xw[d], layer.gates_map, moment.start, b, H, unit);
    return loaded;
  };
  const int width = params.part.rows.width;
  const auto finish = [&](int n, int j, int64_t unit, const Loaded& loaded) {
    const Moment& moment = block.moment(n);
    const int64_t b = block.sequence(n);
    if (s == 0 && length_of(layer.masks, layer.shape.T, b) == 0)
      static_cast<Number*>(to.c_n)[b * H + unit] = narrow<Number>(loaded.c);
    const Sum c = moment.forgets() ? 0 : loaded.c;
    Pre<Tile> pre{};
    if (moment.active()) {
      const Units<Sum, 4> h = block.template product<4>(n, j, width);
      pre = plus(loaded.xw, plus(Pre<Tile>{h.at[0], h.at[1], h.at[2], h.at[3]}, bias));
    }
    Units<CellState<Sum>, 1> cell;
    Units<Sum, 1> out;
    if constexpr (kOptions) {
      const CellStep<Tile, false> step(params.cell, d);
      const Place at = place_of<Tile>(params, moment, d, b, unit);
      cell.at[0] = step.forward(moment, at, peephole, pre, c, out.at[0]);
      if (!layer.shape.projected) out.at[0] = step_h<Tile>(params, moment, at, d, out.at[0]);
    } else {
      cell.at[0] = forward_cell<Tile>(moment, pre, c);
      out.at[0] = moment.active() ? cell_output<typename Tile::Math>(cell.at[0].gates.o, cell.at[0].c) : 0;
    }
    const ForwardRows<Tile> rows = forward_rows<Tile>(layer, to, moment, b);
    store_cells(layer, to, rows, moment, b, unit, stored_cells<Tile>(cell), 1);
    if (params.state) *c_of(b, unit) = carried(moment, cell.at[0].c);
    if (params.hidden) {
      static_cast<Number*>(params.hidden)[(d * layer.shape.B + b) * H + unit] = narrow<Number>(out.at[0]);
    } else {
      store_output(layer, to, rows, moment, b, unit, narrow_units<Number>(out), 1);
    }
  };
  block.template finish_units<Loaded>(load, finish);
}

// Product::kProjection: h.
template <class Tile, class Params, class Block>
__device__ __forceinline__ void step_projection(const Params& params, Block& block, int d) {
  const LayerForward& layer = params.layer;
  const ForwardDirection& to = layer.direction[d];
  struct Nothing {};
  block.template finish_units<Nothing>(
      [](int, int64_t) { return Nothing(); },
      [&](int n, int j, int64_t p, Nothing) {
        const Moment& moment = block.moment(n);
        const int64_t b = block.sequence(n);
        Units<typename Tile::Sum, 1> h = block.product(n, j);
        if constexpr (kHasOptions<Params>)
          h.at[0] = step_h<Tile>(params, moment, place_of<Tile>(params, moment, d, b, p), d, h.at[0]);
        const ForwardRows<Tile> rows = forward_rows<Tile>(layer, to, moment, b);
        store_output(layer, to, rows, moment, b, p, narrow_units<typename Tile::Number>(h), 1);
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
    block.for_units([&](int n, int64_t unit) {
      if (block.moment(n).active())
        prefetch_gates<typename Tile::Sum>(params.xw[d], layer.gates_map, block.moment(n).start, block.sequence(n),
                                           layer.shape.H, unit);
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
  StepBlock<Tile, kBatchTiles, false> block(params.part, layer.shape, layer.masks, layer.gates_map.packed_offset,
                                            layer.direction[d].reverse, params.s);
  take_step_forward<Tile>(params, block, d);
}

template <class Tile, int kBatchTiles, bool kTensorflow>
__global__ void __launch_bounds__(kThreads, 1) cell_step_forward(const __grid_constant__ WithCell<StepForward> params) {
  const int d = blockIdx.y;
  const LayerForward& layer = params.layer;
  StepBlock<Tile, kBatchTiles, kTensorflow, kTensorflow> block(
      params.part, layer.shape, layer.masks, layer.gates_map.packed_offset, layer.direction[d].reverse, params.s);
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

// The gradient of c between the launches of a unit.
template <class Tile>
__device__ __forceinline__ typename Tile::Sum* d_c_of(const StepBackward& params, int d, int64_t b, int64_t unit) {
  const SequenceShape& shape = params.pass.layer.shape;
  return static_cast<typename Tile::Sum*>(params.state) + (d * shape.B + b) * shape.H + unit;
}

// What step_cell_backward reads of the forward pass, and backward_output of dy.
template <class Tile>
__device__ __forceinline__ void prefetch_cell_backward(const StepBackward& params, const Moment& moment, int d,
                                                       int64_t b, int64_t unit) {
  using Number = typename Tile::Number;
  using Sum = typename Tile::Sum;
  const LayerBackward& layer = params.pass.layer;
  const BackwardDirection& from = layer.direction[d];
  if (!moment.active()) return;
  prefetch_gates<Number>(from.gates, layer.gates_map, moment.start, b, layer.shape.H, unit);
  prefetch_to_l2(element<Sum>(from.cells, layer.cells_map, moment.start, b, unit));
  if (params.s > 0) prefetch_to_l2(element<Sum>(from.cells, layer.cells_map, moment.start_before, b, unit));
  if (from.dy && !layer.shape.projected) prefetch_to_l2(element<Number>(from.dy, layer.dy_map, moment.start, b, unit));
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
  const Units<Sum, 1> before{{step.h_before(pass.layer.direction[d].state, moment, params.s, {0, b, p})}};
  store_cell_output_grads(pass, d, rows, moment, b, p, before, Units<Number, 1>{{narrow<Number>(d_h)}}, 1);
  return d_h;
}

// What the pointwise part of a unit reads, as it is stored: to widen it would be to wait for it.
template <class Tile>
struct CellBackwardLoaded {
  GateValues<typename Tile::Number> gates;
  typename Tile::Number dy;
  typename Tile::Sum c, c_prev, d_cells, d_c;
};

template <class Tile>
__device__ __forceinline__ CellBackwardLoaded<Tile> load_cell_backward(const StepBackward& params, const Moment& moment,
                                                                       int d, int64_t b, int64_t unit) {
  using Number = typename Tile::Number;
  using Sum = typename Tile::Sum;
  const LayerBackward& layer = params.pass.layer;
  const BackwardDirection& from = layer.direction[d];
  CellBackwardLoaded<Tile> loaded{};
  if (params.s + 1 < layer.shape.T) loaded.d_c = *d_c_of<Tile>(params, d, b, unit);
  if (!moment.active()) return loaded;
  loaded.gates = read_gates<Number>(from.gates, layer.gates_map, moment.start, b, layer.shape.H, unit);
  loaded.c = *element<Sum>(from.cells, layer.cells_map, moment.start, b, unit);
  if (!moment.forgets())
    loaded.c_prev = params.s > 0 ? *element<Sum>(from.cells, layer.cells_map, moment.start_before, b, unit)
                                 : state_at<Number>(from.state.c0, b, unit);
  if (from.d_cells) loaded.d_cells = *element<Sum>(from.d_cells, layer.d_cells_map, moment.start, b, unit);
  return loaded;
}

// The pointwise part of a unit from the gradient of its h; the gradient of c stays in memory for the next launch.
template <class Tile, class Params>
__device__ __forceinline__ void step_cell_backward(const Params& params, const Moment& moment, int d, int64_t b,
                                                   int64_t unit, typename Tile::Sum d_h,
                                                   const CellBackwardLoaded<Tile>& loaded) {
  constexpr bool kOptions = kHasOptions<Params>;
  using Number = typename Tile::Number;
  using Sum = typename Tile::Sum;
  const LayerBackward& layer = params.pass.layer;
  const BackwardDirection& from = layer.direction[d];
  const SequenceShape& shape = layer.shape;
  const BackwardInputs<Sum> inputs{widen_gates(loaded.gates), loaded.c, loaded.c_prev, loaded.d_cells};
  Sum d_c = loaded.d_c;
  const auto gradients = [&] {
    if constexpr (kOptions) {
      const CellStep<Tile, false> step(params.cell, d);
      return step.backward(from, moment, place_of<Tile>(params, moment, d, b, unit), step.peephole(unit),
                           params.pass.hidden_map, inputs, d_h, d_c);
    } else {
      return backward_cell<Tile>(from, moment, b, unit, inputs, d_h, d_c);
    }
  };
  const Units<BackwardCell<Sum>, 1> cell{{gradients()}};
  const BackwardRows<Tile> rows = backward_rows<Tile, kOptions>(params.pass, d, moment, b);
  store_cell_grads<Tile, kOptions>(params.pass, d, rows, moment, params.s, b, unit, stored_grads<Tile>(cell), 1);
  *d_c_of<Tile>(params, d, b, unit) = d_c;
  if (params.s > 0 || !from.dc0) return;
  if (length_of(layer.masks, shape.T, b) == 0) d_c = state_at<Number>(from.dc_n, b, unit);
  static_cast<Number*>(from.dc0)[b * shape.H + unit] = narrow<Number>(d_c);
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
  using Loaded = CellBackwardLoaded<Tile>;
  const auto load = [&](int n, int64_t p) {
    if (params.s < 0) return Loaded{};
    const Moment& moment = block.moment(n);
    const int64_t b = block.sequence(n);
    Loaded loaded = makes_cells ? load_cell_backward<Tile>(params, moment, d, b, p) : Loaded{};
    if (moment.active() && from.dy) loaded.dy = *element<Number>(from.dy, pass.layer.dy_map, moment.start, b, p);
    return loaded;
  };
  block.template finish_units<Loaded>(load, [&](int n, int j, int64_t p, const Loaded& loaded) {
    const int64_t b = block.sequence(n);
    const auto from_next_step = [&] {
      Sum d_h = block.product(n, j).at[0];
      if constexpr (kOptions) d_h = d_h_of_cell<Tile>(params, d, b, p, d_h);
      return d_h;
    };
    if (params.s < 0) {
      const bool empty = length_of(pass.layer.masks, shape.T, b) == 0;
      const Sum d_h = empty ? state_at<Number>(from.dh_n, b, p) : from_next_step();
      static_cast<Number*>(from.dh0)[b * shape.P + p] = narrow<Number>(d_h);
    } else {
      const Moment& moment = block.moment(n);
      const BackwardRows<Tile> rows = backward_rows<Tile, kOptions>(pass, d, moment, b);
      Sum d_h = backward_output<Number>(from, moment, b, p, from_next_step(), widen(loaded.dy));
      if constexpr (kOptions) {
        d_h = cell_output_backward<Tile>(params, rows, moment, d, b, p, d_h);
      } else {
        store_output_grads(pass, d, rows, moment, params.s, b, p, Units<Number, 1>{{narrow<Number>(d_h)}}, 1);
      }
      if (makes_cells) step_cell_backward<Tile>(params, moment, d, b, p, d_h, loaded);
    }
  });
}

// Product::kProjection: from the gradient of the hidden units to the gates'.
template <class Tile, class Params, class Block>
__device__ __forceinline__ void step_hidden_backward(const Params& params, Block& block, int d) {
  using Loaded = CellBackwardLoaded<Tile>;
  const auto load = [&](int n, int64_t unit) {
    return load_cell_backward<Tile>(params, block.moment(n), d, block.sequence(n), unit);
  };
  block.template finish_units<Loaded>(load, [&](int n, int j, int64_t unit, const Loaded& loaded) {
    step_cell_backward<Tile>(params, block.moment(n), d, block.sequence(n), unit, block.product(n, j).at[0], loaded);
  });
}

// By a block that takes the whole launch.
template <class Tile, class Params, class Block>
__device__ __forceinline__ void take_step_backward(const Params& params, Block& block, int d) {
  const LayerBackward& layer = params.pass.layer;
  const bool recurrent = params.part.product == Product::kRecurrent;
  if (params.s >= 0 && recurrent != layer.shape.projected) {
    block.for_units([&](int n, int64_t unit) {
      prefetch_cell_backward<Tile>(params, block.moment(n), d, block.sequence(n), unit);
    });
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
  StepBlock<Tile, kBatchTiles, true> block(params.part, layer.shape, layer.masks, layer.gates_map.packed_offset,
                                           layer.direction[d].reverse, params.s);
  take_step_backward<Tile>(params, block, d);
}

template <class Tile, int kBatchTiles, bool kTensorflow>
__global__ void __launch_bounds__(kThreads, 1)
    cell_step_backward(const __grid_constant__ WithCell<StepBackward> params) {
  const int d = blockIdx.y;
  const LayerBackward& layer = params.pass.layer;
  StepBlock<Tile, kBatchTiles, !kTensorflow> block(params.part, layer.shape, layer.masks, layer.gates_map.packed_offset,
                                                   layer.direction[d].reverse, params.s);
  take_step_backward<Tile>(params, block, d);
}

}  // namespace lstm_ext::cuda
