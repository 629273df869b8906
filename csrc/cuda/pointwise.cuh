// The pointwise part: what happens to one unit of one sequence at one step, between the products. It is the same for
// every way to divide the work. gate_math.h has the formulas; around them stand the masks, and where each number is
// read and written.
//
//   forward     [pre i f g o] + c            -> c', h            stored: gates, cells, y
//   backward    dh, dc (from the step after) -> d_gates, dc      read: gates, cells, dy; stored: d_gates, h_prev
//
// Backward reads no y: a step has its h again from its gates and cells, and stores it as h_prev of the step after it.
// A thread takes N adjacent units of a sequence, of which the vector may have fewer (`valid`); what it reads and what
// it stores stand apart from the arithmetic, so that neither has to wait for the other.
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
__device__ inline Moment moment_at(const Masks& masks, const int64_t* packed_offset, int64_t T, bool reverse, int64_t s,
                                   int64_t b) {
  const int64_t length = length_of(masks, T, b);
  const auto time = [&](int64_t step) { return reverse && step < length ? length - 1 - step : step; };
  const auto start = [&](int64_t step) {
    return !packed_offset ? time(step) : step >= 0 && step < length ? packed_offset[time(step)] : 0;
  };
  const auto forgets = [&](int64_t step) {
    return masks.resets && step >= 0 && step < length &&
           masks.resets[time(step) * masks.reset_t_stride + b * masks.reset_b_stride] != 0;
  };
  const auto flag = [](bool set, int place) { return static_cast<uint32_t>(set) << place; };
  return {start(s), start(s - 1), start(s + 1),
          flag(s >= 0 && s < length, 0) | flag(s + 1 == length, 1) | flag(s >= 1 && s - 1 < length, 2) |
              flag(forgets(s), 3) | flag(forgets(s + 1), 4)};
}

// Whether the sequence has a row at that step: past its length a packed one has none.
__device__ __forceinline__ bool has_row(const RowMap& map, const Moment& moment) {
  return moment.active() || !map.packed_offset;
}

// `start` is that of a Moment.
template <class T>
__device__ __forceinline__ T* element(void* rows, const RowMap& map, int64_t start, int64_t b, int64_t column) {
  return static_cast<T*>(rows) + map.from_start(start, b) + column;
}
template <class T>
__device__ __forceinline__ const T* element(const void* rows, const RowMap& map, int64_t start, int64_t b,
                                            int64_t column) {
  return static_cast<const T*>(rows) + map.from_start(start, b) + column;
}

// An element of a state [B, width]; zero where there is none.
template <class T>
__device__ __forceinline__ auto state_at(const Matrix& state, int64_t b, int64_t column) {
  using Wide = decltype(widen(T()));
  return state.data ? widen(static_cast<const T*>(state.data)[b * state.row_stride + column]) : Wide(0);
}

template <class T, int N, class Sum>
__device__ __forceinline__ void store_units(T* to, const Units<Sum, N>& values, int valid) {
  struct alignas(N * sizeof(T)) Together {
    T at[N];
  } narrowed;
#pragma unroll
  for (int i = 0; i < N; ++i) narrowed.at[i] = narrow<T>(values.at[i]);
  if (N == 1 || (valid >= N && reinterpret_cast<uintptr_t>(to) % sizeof(Together) == 0)) {
    if (valid >= N) *reinterpret_cast<Together*>(to) = narrowed;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < valid) to[i] = narrowed.at[i];
  }
}

template <class Tile>
using Pre = GateValues<typename Tile::Sum>;

// Stored as T: the gates, or what x contributes to them, of one unit.
template <class T>
__device__ __forceinline__ auto read_gates(const void* gates, const RowMap& map, int64_t start, int64_t b, int64_t H,
                                           int64_t unit) {
  const T* at = element<T>(gates, map, start, b, unit);
  return GateValues<decltype(widen(T()))>{widen(at[0]), widen(at[H]), widen(at[2 * H]), widen(at[3 * H])};
}

template <class T, class Sum, int N>
__device__ __forceinline__ void store_gates(void* gates, const RowMap& map, int64_t start, int64_t b, int64_t H,
                                            int64_t unit, const Units<GateValues<Sum>, N>& values, int valid) {
  T* at = element<T>(gates, map, start, b, unit);
  Units<Sum, N> i, f, g, o;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    i.at[n] = values.at[n].i;
    f.at[n] = values.at[n].f;
    g.at[n] = values.at[n].g;
    o.at[n] = values.at[n].o;
  }
  store_units(at, i, valid);
  store_units(at + H, f, valid);
  store_units(at + 2 * H, g, valid);
  store_units(at + 3 * H, o, valid);
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

// One step of one unit from its gates' weighted sums; c is the state that it starts from.
template <class Tile>
__device__ __forceinline__ CellState<typename Tile::Sum> forward_cell(const Moment& moment, const Pre<Tile>& pre,
                                                                      typename Tile::Sum c) {
  const auto state = cell_state<typename Tile::Math>(pre, c);  // whether it counts or not: no branch
  return moment.active() ? state : CellState<typename Tile::Sum>{};
}

// What the next step starts from.
template <class Sum>
__device__ __forceinline__ Sum carried(const Moment& moment, Sum value) {
  return moment.active() && !moment.forgets_next() ? value : 0;
}

template <class Tile, int N>
__device__ __forceinline__ void store_cells(const LayerForward& layer, const ForwardDirection& to, const Moment& moment,
                                            int64_t b, int64_t unit,
                                            const Units<CellState<typename Tile::Sum>, N>& states, int valid) {
  using Number = typename Tile::Number;
  using Sum = typename Tile::Sum;
  Units<GateValues<Sum>, N> gates;
  Units<Sum, N> c;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    gates.at[n] = states.at[n].gates;
    c.at[n] = states.at[n].c;
  }
  if (has_row(layer.gates_map, moment)) {
    if (to.gates) store_gates<Number>(to.gates, layer.gates_map, moment.start, b, layer.shape.H, unit, gates, valid);
    if (to.cells) store_units(element<Sum>(to.cells, layer.cells_map, moment.start, b, unit), c, valid);
  }
  if (moment.last()) store_units(static_cast<Number*>(to.c_n) + b * layer.shape.H + unit, c, valid);
}

template <class Tile, int N>
__device__ __forceinline__ void store_output(const LayerForward& layer, const ForwardDirection& to,
                                             const Moment& moment, int64_t b, int64_t p,
                                             const Units<typename Tile::Sum, N>& h, int valid) {
  using Number = typename Tile::Number;
  Units<typename Tile::Sum, N> y = h;
#pragma unroll
  for (int n = 0; n < N; ++n)
    if (!moment.active()) y.at[n] = 0;
  if (has_row(layer.y_map, moment)) store_units(element<Number>(to.y, layer.y_map, moment.start, b, p), y, valid);
  if (moment.last() && to.h_n) store_units(static_cast<Number*>(to.h_n) + b * layer.shape.P + p, h, valid);
}

// ---- Backward -------------------------------------------------------------------------------------------------

// Whether no step before this one leaves an h to it.
__device__ __forceinline__ bool begins(const Moment& moment, int64_t s) { return s == 0 || !moment.active(); }

// The gradient of one step's h: what comes back through time, and from the outputs.
template <class Number, class Sum>
__device__ __forceinline__ Sum backward_output(const BackwardDirection& from, const Moment& moment, int64_t b,
                                               int64_t p, Sum d_h, Sum dy) {
  if (!moment.active()) return 0;
  d_h += dy;
  return moment.last() ? d_h + state_at<Number>(from.dh_n, b, p) : d_h;
}

// h that step s started from where no step before it stores it, and the gradient of its own.
template <class Tile, int N>
__device__ __forceinline__ void store_output_grads(const BackwardPass& pass, int d, const Moment& moment, int64_t s,
                                                   int64_t b, int64_t p, const Units<typename Tile::Sum, N>& d_h,
                                                   int valid) {
  using Number = typename Tile::Number;
  const BackwardOutputs& to = pass.outputs[d];
  if (!has_row(pass.h_map, moment)) return;
  if (begins(moment, s) || pass.layer.shape.projected) {
    const bool from_h0 = s == 0 && moment.active() && !moment.forgets();
    Units<typename Tile::Sum, N> h;
#pragma unroll
    for (int n = 0; n < N; ++n)
      h.at[n] = from_h0 && n < valid ? state_at<Number>(pass.layer.direction[d].state.h0, b, p + n) : 0;
    store_units(element<Number>(to.h_prev, pass.h_map, moment.start, b, p), h, valid);
  }
  if (to.d_h) store_units(element<Number>(to.d_h, pass.h_map, moment.start, b, p), d_h, valid);
}

// The same of a cell with options, whose steps each know the h that they started from, `before`.
template <class Tile, int N>
__device__ __forceinline__ void store_cell_output_grads(const BackwardPass& pass, int d, const Moment& moment,
                                                        int64_t b, int64_t p,
                                                        const Units<typename Tile::Sum, N>& before,
                                                        const Units<typename Tile::Sum, N>& d_h, int valid) {
  using Number = typename Tile::Number;
  const BackwardOutputs& to = pass.outputs[d];
  if (!has_row(pass.h_map, moment)) return;
  store_units(element<Number>(to.h_prev, pass.h_map, moment.start, b, p), before, valid);
  if (to.d_h) store_units(element<Number>(to.d_h, pass.h_map, moment.start, b, p), d_h, valid);
}

// What the gradients of one unit's step are made of.
template <class Sum>
struct BackwardInputs {
  GateValues<Sum> gates;
  Sum c, c_prev, d_cells;  // c_prev is zero where the step forgets
};

template <class Sum>
struct BackwardCell {
  CellStepGrad<Sum> grad;
  Sum hidden;  // before a projection
};

// From the gradient of a unit's h; d_c is what later steps want of c, and then what the step before is to know.
template <class Tile>
__device__ __forceinline__ BackwardCell<typename Tile::Sum> backward_cell(
    const BackwardDirection& from, const Moment& moment, int64_t b, int64_t unit,
    const BackwardInputs<typename Tile::Sum>& inputs, typename Tile::Sum d_h, typename Tile::Sum& d_c) {
  using Sum = typename Tile::Sum;
  const Sum tanh_c = Tile::Math::tanh(inputs.c);
  if (moment.active() && moment.last()) d_c = state_at<typename Tile::Number>(from.dc_n, b, unit);
  const BackwardCell<Sum> counted{cell_backward(inputs.gates, inputs.c_prev, tanh_c, d_h, d_c + inputs.d_cells),
                                  inputs.gates.o * tanh_c};  // whether it counts or not: no branch
  const BackwardCell<Sum> cell = moment.active() ? counted : BackwardCell<Sum>{};
  d_c = moment.forgets() ? 0 : cell.grad.d_c_prev;
  return cell;
}

// The gates' gradients as the step before is to know them.
template <class Sum>
__device__ __forceinline__ GateValues<Sum> carried_back(const Moment& moment, const BackwardCell<Sum>& cell) {
  return moment.forgets() ? GateValues<Sum>{} : cell.grad.d_pre;
}

// kOptions: of a cell with options, whose h_prev is stored by store_cell_output_grads.
template <class Tile, bool kOptions, int N>
__device__ __forceinline__ void store_cell_grads(const BackwardPass& pass, int d, const Moment& moment, int64_t s,
                                                 int64_t b, int64_t unit,
                                                 const Units<BackwardCell<typename Tile::Sum>, N>& cells, int valid) {
  using Number = typename Tile::Number;
  using Sum = typename Tile::Sum;
  const BackwardOutputs& to = pass.outputs[d];
  Units<GateValues<Sum>, N> d_gates;
  Units<Sum, N> hidden, carried_hidden;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    d_gates.at[n] = cells.at[n].grad.d_pre;
    hidden.at[n] = cells.at[n].hidden;
    carried_hidden.at[n] = moment.forgets_next() ? 0 : hidden.at[n];
  }
  if (!kOptions && moment.active() && !moment.last())
    store_units(element<Number>(to.hidden_prev, pass.hidden_map, moment.start_after, b, unit), carried_hidden, valid);
  if (!has_row(pass.d_gates_map, moment)) return;
  store_gates<Number>(to.d_gates, pass.d_gates_map, moment.start, b, pass.layer.shape.H, unit, d_gates, valid);
  if (!to.hidden) return;
  store_units(element<Number>(to.hidden, pass.hidden_map, moment.start, b, unit), hidden, valid);
  if (!kOptions && begins(moment, s))
    store_units(element<Number>(to.hidden_prev, pass.hidden_map, moment.start, b, unit), Units<Sum, N>{}, valid);
}

}  // namespace lstm_ext::cuda
