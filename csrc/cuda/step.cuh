// One step of a layer in a launch, two with a projection: nothing needs to fit on chip. A block takes a tile of rows of
// the weights and sequences (step_tile.cuh), of a large k with others of its cluster, and then the pointwise part of
// the units of the tile. What lets a launch begin while the one before it still runs:
//
//   launch s      rows and weights of the first stages | wait |  operand, product  | sums | pointwise
//   launch s + 1                                                rows and weights of the first ...    | wait | ...
//
// A launch has waited before it reads what an earlier one wrote, or writes.
#pragma once

#include "step_block.cuh"

namespace lstm_ext::cuda {

// Blocks that a multiprocessor holds at a time: two, where 128 registers are enough for the sums and what goes with
// them. From sm_100 on they are not for numbers of 4 bytes.
#if __CUDA_ARCH__ >= 1000
inline constexpr int kMostBytesOfTwoBlocks = 2;
#else
inline constexpr int kMostBytesOfTwoBlocks = 4;
#endif
template <class Tile, int kBatchTiles>
inline constexpr int kStepBlocks = kBatchTiles < 8 && sizeof(typename Tile::Number) <= kMostBytesOfTwoBlocks ? 2 : 1;

// Asks for the four gates of a unit.
template <class T>
__device__ __forceinline__ void prefetch_gates(const void* gates, const RowMap& map, int64_t start, int64_t b,
                                               int64_t H, int64_t unit) {
  const T* at = element<T>(gates, map, start, b, unit);
  for (int gate = 0; gate < 4; ++gate) prefetch_to_l2(at + gate * H);
}

// ---- Forward --------------------------------------------------------------------------------------------------

// The matrices that a launch multiplies, in one loop so that its code stands there once: w_ih with x, if that is given,
// and then w_hh with h; or w_hr with the hidden units that the launch before has left in memory.
template <class Tile, class Block>
__device__ __forceinline__ void step_products(const StepForward& params, Block& block, int d) {
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
      if (!moment.active || moment.forgets) return nullptr;
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

// Product::kRecurrent: the pointwise part from the gates' sums. Without a projection this is all.
template <class Tile, class Block>
__device__ __forceinline__ void step_gates(const StepForward& params, Block& block, int d) {
  using Number = typename Tile::Number;
  using Sum = typename Tile::Sum;
  const LayerForward& layer = params.layer;
  const ForwardDirection& to = layer.direction[d];
  const int64_t H = layer.shape.H, s = params.s;
  const auto c_of = [&](int64_t b, int64_t unit) {
    return static_cast<Sum*>(params.state) + (d * layer.shape.B + b) * H + unit;
  };
  const Pre<Tile> bias = block.has_unit() ? bias_of<Tile>(to.weights, H, block.unit()) : Pre<Tile>{};
  struct Loaded {
    Sum c;
    Pre<Tile> xw;
  };
  const auto load = [&](int n, int64_t unit) {
    const Moment& moment = block.moment(n);
    const int64_t b = block.sequence(n);
    Loaded loaded{s == 0 ? state_at<Number>(to.state.c0, b, unit) : *c_of(b, unit), {}};
    if (moment.active && params.xw[d])
      loaded.xw = read_gates<Sum>(params.xw[d], layer.gates_map, moment.start, b, H, unit);
    return loaded;
  };
  const int width = params.part.rows.width;
  const auto finish = [&](int n, int j, int64_t unit, const Loaded& loaded) {
    const Moment& moment = block.moment(n);
    const int64_t b = block.sequence(n);
    if (s == 0 && length_of(layer.masks, layer.shape.T, b) == 0)
      static_cast<Number*>(to.c_n)[b * H + unit] = narrow<Number>(loaded.c);
    const Sum c = moment.forgets ? 0 : loaded.c;
    Pre<Tile> pre{};
    if (moment.active) {
      const Pre<Tile> h{block.product(n, j), block.product(n, width + j), block.product(n, 2 * width + j),
                        block.product(n, 3 * width + j)};
      pre = plus(loaded.xw, plus(h, bias));
    }
    const Units<CellState<Sum>, 1> cell{{forward_cell<Tile>(moment, pre, c)}};
    const Units<Sum, 1> out{{moment.active ? cell_output<typename Tile::Math>(cell.at[0].gates.o, cell.at[0].c) : 0}};
    store_cells<Tile>(layer, to, moment, b, unit, cell, 1);
    if (params.state) *c_of(b, unit) = carried(moment, cell.at[0].c);
    if (params.hidden) {
      static_cast<Number*>(params.hidden)[(d * layer.shape.B + b) * H + unit] = narrow<Number>(out.at[0]);
    } else {
      store_output<Tile>(layer, to, moment, b, unit, out, 1);
    }
  };
  block.template finish_units<Loaded>(load, finish);
}

// Product::kProjection: h.
template <class Tile, class Block>
__device__ __forceinline__ void step_projection(const StepForward& params, Block& block, int d) {
  const LayerForward& layer = params.layer;
  const ForwardDirection& to = layer.direction[d];
  struct Nothing {};
  block.template finish_units<Nothing>([](int, int64_t) { return Nothing(); },
                                       [&](int n, int j, int64_t p, Nothing) {
                                         const Units<typename Tile::Sum, 1> h{{block.product(n, j)}};
                                         store_output<Tile>(layer, to, block.moment(n), block.sequence(n), p, h, 1);
                                       });
}

// A sequence of length 0 ends with the h that it starts from.
template <class Tile>
__device__ void keep_initial_h(const LayerForward& layer, const ForwardDirection& to, int64_t b, int64_t p) {
  using Number = typename Tile::Number;
  if (length_of(layer.masks, layer.shape.T, b) == 0)
    static_cast<Number*>(to.h_n)[b * layer.shape.P + p] = narrow<Number>(state_at<Number>(to.state.h0, b, p));
}

template <class Tile, int kBatchTiles>
__global__ void __launch_bounds__(kThreads, kStepBlocks<Tile, kBatchTiles>)
    step_forward(const __grid_constant__ StepForward params) {
  const int d = blockIdx.y;
  const LayerForward& layer = params.layer;
  StepBlock<Tile, kBatchTiles, false> block(params.part, layer.shape, layer.masks, layer.gates_map.packed_offset,
                                            layer.direction[d].reverse, params.s);
  const bool gates = params.part.product == Product::kRecurrent;
  if (gates && params.xw[d]) {
    block.for_units([&](int n, int64_t unit) {
      if (block.moment(n).active)
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

// ---- Backward -------------------------------------------------------------------------------------------------

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
  if (!moment.active) return;
  prefetch_gates<Number>(from.gates, layer.gates_map, moment.start, b, layer.shape.H, unit);
  prefetch_to_l2(element<Sum>(from.cells, layer.cells_map, moment.start, b, unit));
  if (params.s > 0) prefetch_to_l2(element<Sum>(from.cells, layer.cells_map, moment.start_before, b, unit));
  if (from.dy && !layer.shape.projected) prefetch_to_l2(element<Number>(from.dy, layer.dy_map, moment.start, b, unit));
}

// The pointwise part of a unit from the gradient of its h; the gradient of c stays in memory for the next launch.
template <class Tile>
__device__ __forceinline__ void step_cell_backward(const StepBackward& params, const Moment& moment, int d, int64_t b,
                                                   int64_t unit, typename Tile::Sum d_h, typename Tile::Sum d_c) {
  using Number = typename Tile::Number;
  using Sum = typename Tile::Sum;
  const LayerBackward& layer = params.pass.layer;
  const BackwardDirection& from = layer.direction[d];
  const SequenceShape& shape = layer.shape;
  BackwardInputs<Sum> inputs{};
  if (moment.active) {
    inputs.gates = read_gates<Number>(from.gates, layer.gates_map, moment.start, b, shape.H, unit);
    inputs.c = *element<Sum>(from.cells, layer.cells_map, moment.start, b, unit);
    if (!moment.forgets)
      inputs.c_prev = params.s > 0 ? *element<Sum>(from.cells, layer.cells_map, moment.start_before, b, unit)
                                   : state_at<Number>(from.state.c0, b, unit);
    if (from.d_cells) inputs.d_cells = *element<Sum>(from.d_cells, layer.d_cells_map, moment.start, b, unit);
  }
  const Units<BackwardCell<Sum>, 1> cell{{backward_cell<Tile>(from, moment, b, unit, inputs, d_h, d_c)}};
  store_cell_grads<Tile>(params.pass, d, moment, params.s, b, unit, cell, 1);
  *d_c_of<Tile>(params, d, b, unit) = d_c;
  if (params.s > 0 || !from.dc0) return;
  if (length_of(layer.masks, shape.T, b) == 0) d_c = state_at<Number>(from.dc_n, b, unit);
  static_cast<Number*>(from.dc0)[b * shape.H + unit] = narrow<Number>(d_c);
}

// What a launch multiplies: w_hh' with the gates' gradients of step s + 1, or w_hr' with the gradient of h, which the
// launch before has left in d_h.
template <class Tile, class Block>
__device__ __forceinline__ void step_products_backward(const StepBackward& params, Block& block, int d) {
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
    if (projection) return moment.active ? element<Number>(d_h, pass.h_map, moment.start, b, 0) : nullptr;
    return next.active && !next.forgets ? element<Number>(d_gates, pass.d_gates_map, next.start, b, 0) : nullptr;
  };
  block.add(projection ? weights.w_hr : weights.w_hh, projection ? shape.P : 4 * shape.H, row_of);
}

// The gradient of h after step s, and without a projection on to the gates'.
template <class Tile, class Block>
__device__ __forceinline__ void step_h_backward(const StepBackward& params, Block& block, int d) {
  using Number = typename Tile::Number;
  using Sum = typename Tile::Sum;
  const BackwardPass& pass = params.pass;
  const BackwardDirection& from = pass.layer.direction[d];
  const SequenceShape& shape = pass.layer.shape;
  const bool makes_cells = params.s >= 0 && !shape.projected;
  const auto load = [&](int n, int64_t unit) {
    return makes_cells && params.s + 1 < shape.T ? *d_c_of<Tile>(params, d, block.sequence(n), unit) : Sum(0);
  };
  block.template finish_units<Sum>(load, [&](int n, int j, int64_t p, Sum d_c) {
    const int64_t b = block.sequence(n);
    if (params.s < 0) {
      const bool empty = length_of(pass.layer.masks, shape.T, b) == 0;
      const Sum d_h = empty ? state_at<Number>(from.dh_n, b, p) : block.product(n, j);
      static_cast<Number*>(from.dh0)[b * shape.P + p] = narrow<Number>(d_h);
    } else {
      const Moment& moment = block.moment(n);
      Sum dy = 0;
      if (moment.active && from.dy) dy = widen(*element<Number>(from.dy, pass.layer.dy_map, moment.start, b, p));
      const Sum d_h = backward_output<Number>(from, moment, b, p, block.product(n, j), dy);
      store_output_grads<Tile>(pass, d, moment, params.s, b, p, Units<Sum, 1>{{d_h}}, 1);
      if (makes_cells) step_cell_backward<Tile>(params, moment, d, b, p, d_h, d_c);
    }
  });
}

// Product::kProjection: from the gradient of the hidden units to the gates'.
template <class Tile, class Block>
__device__ __forceinline__ void step_hidden_backward(const StepBackward& params, Block& block, int d) {
  using Sum = typename Tile::Sum;
  const SequenceShape& shape = params.pass.layer.shape;
  const auto load = [&](int n, int64_t unit) {
    return params.s + 1 < shape.T ? *d_c_of<Tile>(params, d, block.sequence(n), unit) : Sum(0);
  };
  block.template finish_units<Sum>(load, [&](int n, int j, int64_t unit, Sum d_c) {
    step_cell_backward<Tile>(params, block.moment(n), d, block.sequence(n), unit, block.product(n, j), d_c);
  });
}

template <class Tile, int kBatchTiles>
__global__ void __launch_bounds__(kThreads, kStepBlocks<Tile, kBatchTiles>)
    step_backward(const __grid_constant__ StepBackward params) {
  const int d = blockIdx.y;
  const LayerBackward& layer = params.pass.layer;
  StepBlock<Tile, kBatchTiles, true> block(params.part, layer.shape, layer.masks, layer.gates_map.packed_offset,
                                           layer.direction[d].reverse, params.s);
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

}  // namespace lstm_ext::cuda
