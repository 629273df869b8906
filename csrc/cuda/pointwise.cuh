// The pointwise part: what happens to one unit of one sequence at one step, between the products. It is the same for
// every way to divide the work. gate_math.h has the formulas; around them stand the masks, and where each number is
// read and written.
//
//   forward     [pre i f g o] + c            -> c', h            stored: gates, cells, y
//   backward    dh, dc (from the step after) -> d_gates, dc      read: gates, cells, dy; stored: d_gates, h_prev
//
// Backward reads no y: a step has its h again from its gates and cells, and stores it as h_prev of the step after it.
//
// One sequence of length 3, where T = 5, with a reset at t = 2. Forward walks to the right, backward to the left:
//
//   step s           0        1        2        3        4
//   t                0        1        2        3        4         reverse: 2 1 0 3 4
//   active           yes      yes      yes      no       no        past the length y is 0 and the state rests
//   last                               yes                         h_n and c_n are written, dh_n and dc_n read
//   forgets                            yes                         what it starts from is 0, and so is the gradient of
//   that
#pragma once

#include "kernel_params.h"
#include "tile.cuh"

namespace lstm_ext::cuda {

__device__ __forceinline__ int64_t length_of(const Masks& masks, int64_t T, int64_t b) {
  return masks.lengths ? max(int64_t{0}, min(T, masks.lengths[b])) : T;
}

// A reversed sequence is walked from its last valid step to its first; past the length nothing is reversed.
__device__ inline Moment moment_at(const Masks& masks, int64_t T, bool reverse, int64_t s, int64_t b) {
  const int64_t length = length_of(masks, T, b);
  const auto time = [&](int64_t step) { return reverse && step < length ? length - 1 - step : step; };
  const auto forgets = [&](int64_t step) {
    return masks.resets && step >= 0 && step < length &&
           masks.resets[time(step) * masks.reset_t_stride + b * masks.reset_b_stride] != 0;
  };
  return {time(s), time(s - 1), s < length, s + 1 == length, forgets(s), forgets(s + 1)};
}

// Whether the sequence has a row at that step: past its length a packed one has none.
__device__ __forceinline__ bool has_row(const RowMap& map, const Moment& moment) {
  return moment.active || !map.packed_offset;
}

template <class T>
__device__ __forceinline__ T* element(void* rows, const RowMap& map, int64_t t, int64_t b, int64_t column) {
  return static_cast<T*>(rows) + map.at(t, b) + column;
}
template <class T>
__device__ __forceinline__ const T* element(const void* rows, const RowMap& map, int64_t t, int64_t b, int64_t column) {
  return static_cast<const T*>(rows) + map.at(t, b) + column;
}

// An element of a state [B, width]; zero where there is none.
template <class T>
__device__ __forceinline__ auto state_at(const Matrix& state, int64_t b, int64_t column) {
  using Wide = decltype(widen(T()));
  return state.data ? widen(static_cast<const T*>(state.data)[b * state.row_stride + column]) : Wide(0);
}

template <class Tile>
using Pre = GateValues<typename Tile::Sum>;

// Stored as T: the gates, or what x contributes to them.
template <class T>
__device__ __forceinline__ auto read_gates(const void* gates, const RowMap& map, int64_t t, int64_t b, int64_t H,
                                           int64_t unit) {
  const T* at = element<T>(gates, map, t, b, unit);
  return GateValues<decltype(widen(T()))>{widen(at[0]), widen(at[H]), widen(at[2 * H]), widen(at[3 * H])};
}

template <class Tile>
__device__ __forceinline__ void write_gates(void* gates, const RowMap& map, int64_t t, int64_t b, int64_t H,
                                            int64_t unit, const Pre<Tile>& values) {
  using Number = typename Tile::Number;
  Number* at = element<Number>(gates, map, t, b, unit);
  at[0] = narrow<Number>(values.i);
  at[H] = narrow<Number>(values.f);
  at[2 * H] = narrow<Number>(values.g);
  at[3 * H] = narrow<Number>(values.o);
}

template <class Tile>
__device__ __forceinline__ Pre<Tile> bias_of(const LayerWeights& weights, int64_t H, int64_t unit) {
  using Number = typename Tile::Number;
  if (!weights.b_ih) return {0, 0, 0, 0};
  const Number *ih = static_cast<const Number*>(weights.b_ih) + unit,
               *hh = static_cast<const Number*>(weights.b_hh) + unit;
  return {widen(ih[0]) + widen(hh[0]), widen(ih[H]) + widen(hh[H]), widen(ih[2 * H]) + widen(hh[2 * H]),
          widen(ih[3 * H]) + widen(hh[3 * H])};
}

template <class Sum>
__device__ __forceinline__ GateValues<Sum> plus(const GateValues<Sum>& a, const GateValues<Sum>& b) {
  return {a.i + b.i, a.f + b.f, a.g + b.g, a.o + b.o};
}

// ---- Forward --------------------------------------------------------------------------------------------------

// The output h of one step; returns what the next step starts from.
template <class Tile>
__device__ __forceinline__ typename Tile::Sum forward_output(const LayerForward& layer, const ForwardDirection& to,
                                                             const Moment& moment, int64_t b, int64_t p,
                                                             typename Tile::Sum h) {
  using Number = typename Tile::Number;
  if (has_row(layer.y_map, moment))
    *element<Number>(to.y, layer.y_map, moment.t, b, p) = narrow<Number>(moment.active ? h : 0);
  if (moment.last && to.h_n) static_cast<Number*>(to.h_n)[b * layer.shape.P + p] = narrow<Number>(h);
  return moment.active && !moment.forgets_next ? h : 0;
}

// One step of one unit from its gates' weighted sums; c is the state, zero where the step forgets. Returns h, and with
// it c what the next step starts from.
template <class Tile>
__device__ __forceinline__ typename Tile::Sum forward_cell(const LayerForward& layer, const ForwardDirection& to,
                                                           const Moment& moment, int64_t b, int64_t unit,
                                                           const Pre<Tile>& pre, typename Tile::Sum& c) {
  using Number = typename Tile::Number;
  using Sum = typename Tile::Sum;
  const int64_t H = layer.shape.H;
  CellState<Sum> state{};
  Sum h = 0;
  if (moment.active) {
    state = cell_state<typename Tile::Math>(pre, c);
    h = cell_output<typename Tile::Math>(state.gates.o, state.c);
  }
  if (has_row(layer.gates_map, moment)) {
    if (to.gates) write_gates<Tile>(to.gates, layer.gates_map, moment.t, b, H, unit, state.gates);
    if (to.cells) *element<Sum>(to.cells, layer.cells_map, moment.t, b, unit) = state.c;
  }
  if (moment.last) static_cast<Number*>(to.c_n)[b * H + unit] = narrow<Number>(state.c);
  c = moment.forgets_next ? 0 : state.c;
  return h;
}

// ---- Backward -------------------------------------------------------------------------------------------------

// Whether no step before this one leaves an h to it.
__device__ __forceinline__ bool begins(const Moment& moment, int64_t s) { return s == 0 || !moment.active; }

// The gradient of one step's h: what comes back through time, and from the outputs.
template <class Tile>
__device__ __forceinline__ typename Tile::Sum backward_output(const BackwardPass& pass, int d, const Moment& moment,
                                                              int64_t s, int64_t b, int64_t p, typename Tile::Sum d_h) {
  using Number = typename Tile::Number;
  const LayerBackward& layer = pass.layer;
  const BackwardDirection& from = layer.direction[d];
  const BackwardOutputs& to = pass.outputs[d];
  if (!moment.active) d_h = 0;
  if (moment.active) {
    if (from.dy) d_h += widen(*element<Number>(from.dy, layer.dy_map, moment.t, b, p));
    if (moment.last) d_h += state_at<Number>(from.dh_n, b, p);
  }
  if (has_row(pass.h_map, moment)) {
    if (begins(moment, s) || layer.shape.projected) {
      const bool from_h0 = s == 0 && moment.active && !moment.forgets;
      *element<Number>(to.h_prev, pass.h_map, moment.t, b, p) =
          narrow<Number>(from_h0 ? state_at<Number>(from.state.h0, b, p) : 0);
    }
    if (to.d_h) *element<Number>(to.d_h, pass.h_map, moment.t, b, p) = narrow<Number>(d_h);
  }
  return d_h;
}

// The gradients of one step of one unit, from that of its h; d_c is what later steps want of c, and then what the step
// before is to know. Returns the gates' gradients as the step before is to know them.
template <class Tile>
__device__ __forceinline__ Pre<Tile> backward_cell(const BackwardPass& pass, int d, const Moment& moment, int64_t s,
                                                   int64_t b, int64_t unit, typename Tile::Sum d_h,
                                                   typename Tile::Sum& d_c) {
  using Number = typename Tile::Number;
  using Sum = typename Tile::Sum;
  const LayerBackward& layer = pass.layer;
  const BackwardDirection& from = layer.direction[d];
  const BackwardOutputs& to = pass.outputs[d];
  const int64_t H = layer.shape.H;
  CellStepGrad<Sum> grad{};
  Sum hidden = 0;
  if (moment.active) {
    const Pre<Tile> gates = read_gates<Number>(from.gates, layer.gates_map, moment.t, b, H, unit);
    Sum c_prev = 0;
    if (!moment.forgets)
      c_prev = s > 0 ? *element<Sum>(from.cells, layer.cells_map, moment.t_before, b, unit)
                     : state_at<Number>(from.state.c0, b, unit);
    const Sum tanh_c = Tile::Math::tanh(*element<Sum>(from.cells, layer.cells_map, moment.t, b, unit));
    if (moment.last) d_c = state_at<Number>(from.dc_n, b, unit);
    if (from.d_cells) d_c += *element<Sum>(from.d_cells, layer.d_cells_map, moment.t, b, unit);
    grad = cell_backward(gates, c_prev, tanh_c, d_h, d_c);
    hidden = gates.o * tanh_c;
    if (!moment.last) {
      const int64_t t_after = 2 * moment.t - moment.t_before;
      *element<Number>(to.hidden_prev, pass.hidden_map, t_after, b, unit) =
          narrow<Number>(moment.forgets_next ? 0 : hidden);
    }
  }
  if (has_row(pass.d_gates_map, moment)) {
    write_gates<Tile>(to.d_gates, pass.d_gates_map, moment.t, b, H, unit, grad.d_pre);
    if (to.hidden) {
      *element<Number>(to.hidden, pass.hidden_map, moment.t, b, unit) = narrow<Number>(hidden);
      if (begins(moment, s))
        *element<Number>(to.hidden_prev, pass.hidden_map, moment.t, b, unit) = narrow<Number>(Sum(0));
    }
  }
  d_c = moment.forgets ? 0 : grad.d_c_prev;
  if (moment.forgets) grad.d_pre = {};
  return grad.d_pre;
}

}  // namespace lstm_ext::cuda
