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

#include <type_traits>

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

// N units of the same, of which `valid` are there.
template <int N, class T>
__device__ __forceinline__ auto units_of_state(const Matrix& state, int64_t b, int64_t unit, int valid) {
  Units<decltype(widen(T())), N> units{};
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i < valid) units.at[i] = state_at<T>(state, b, unit + i);
  return units;
}

// N numbers as they were read: a pair of a half type in one register, where each would have its own else.
template <class T, int N>
using Stored = std::conditional_t<sizeof(T) == 2 && N == 2, uint32_t, Units<T, N>>;

// N units that lie together; those from number `valid` on are none, and zero. kTogether: all are there, and aligned.
template <int N, bool kTogether, class T>
__device__ __forceinline__ Stored<T, N> load_some(const T* from, int valid) {
  if constexpr (kTogether) {
    return *reinterpret_cast<const Stored<T, N>*>(from);
  } else {
    Units<T, N> units{};
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < valid) units.at[i] = from[i];
    return bits_as<Stored<T, N>>(units);
  }
}
template <int N, class T>
__device__ __forceinline__ Stored<T, N> load_units(const T* from, int valid) {
  const bool together = valid >= N && reinterpret_cast<uintptr_t>(from) % sizeof(Stored<T, N>) == 0;
  return together ? load_some<N, true>(from, valid) : load_some<N, false>(from, valid);
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
__device__ __forceinline__ GateValues<T> read_gates(const void* gates, const RowMap& map, int64_t start, int64_t b,
                                                    int64_t H, int64_t unit) {
  const T* at = element<T>(gates, map, start, b, unit);
  return {at[0], at[H], at[2 * H], at[3 * H]};
}

template <class T>
__device__ __forceinline__ auto widen_gates(const GateValues<T>& gates) {
  return GateValues<decltype(widen(T()))>{widen(gates.i), widen(gates.f), widen(gates.g), widen(gates.o)};
}

// The same gate of N units together, as T: the way in which they are stored.
template <class T, int N>
using GateUnits = GateValues<Units<T, N>>;

// Of such that were read, those of unit n.
template <class T, int N>
__device__ __forceinline__ GateValues<T> gates_of(const GateValues<Stored<T, N>>& gates, int n) {
  const auto of = [&](const Stored<T, N>& gate) { return bits_as<Units<T, N>>(gate).at[n]; };
  return {of(gates.i), of(gates.f), of(gates.g), of(gates.o)};
}

template <class T, class Sum, int N>
__device__ __forceinline__ Units<T, N> narrow_units(const Units<Sum, N>& values) {
  Units<T, N> result;
#pragma unroll
  for (int n = 0; n < N; ++n) result.at[n] = narrow<T>(values.at[n]);
  return result;
}
template <class T, class Sum, int N>
__device__ __forceinline__ GateUnits<T, N> narrow_gates(const Units<GateValues<Sum>, N>& values) {
  GateUnits<T, N> result;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    result.i.at[n] = narrow<T>(values.at[n].i);
    result.f.at[n] = narrow<T>(values.at[n].f);
    result.g.at[n] = narrow<T>(values.at[n].g);
    result.o.at[n] = narrow<T>(values.at[n].o);
  }
  return result;
}

template <class T, int N>
__device__ __forceinline__ void store_gates(T* to, int64_t H, const GateUnits<T, N>& values, int valid) {
  T* const at[] = {to, to + H, to + 2 * H, to + 3 * H};
  const Units<T, N> each[] = {values.i, values.f, values.g, values.o};
  constexpr size_t kBytes = N * sizeof(T);
  if (valid >= N &&
      (N == 1 || (reinterpret_cast<uintptr_t>(to) | static_cast<uint64_t>(H) * sizeof(T)) % kBytes == 0)) {
    struct alignas(kBytes) Together {
      Units<T, N> units;
    };
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) *reinterpret_cast<Together*>(at[gate]) = {each[gate]};
  } else {
#pragma unroll
    for (int gate = 0; gate < 4; ++gate)
#pragma unroll
      for (int n = 0; n < N; ++n)
        if (n < valid) at[gate][n] = each[gate].at[n];
  }
}

// The way back, as `load_units`.
template <int N, class T>
__device__ __forceinline__ GateValues<Stored<T, N>> load_gates(const T* from, int64_t H, int valid) {
  const auto load = [&](auto together) -> GateValues<Stored<T, N>> {
    const auto gate = [&](int n) { return load_some<N, together>(from + n * H, valid); };
    return {gate(0), gate(1), gate(2), gate(3)};
  };
  const uint64_t addresses = reinterpret_cast<uintptr_t>(from) | static_cast<uint64_t>(H) * sizeof(T);
  const bool together = valid >= N && addresses % sizeof(Stored<T, N>) == 0;
  return together ? load(std::true_type()) : load(std::false_type());
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

// What a step has made of N units, as it is stored.
template <class Tile, int N>
struct StoredCells {
  GateUnits<typename Tile::Number, N> gates;
  Units<typename Tile::Sum, N> c;
};

template <class Tile, int N>
__device__ __forceinline__ StoredCells<Tile, N> stored_cells(const Units<CellState<typename Tile::Sum>, N>& states) {
  Units<GateValues<typename Tile::Sum>, N> gates;
  StoredCells<Tile, N> result;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    gates.at[n] = states.at[n].gates;
    result.c.at[n] = states.at[n].c;
  }
  result.gates = narrow_gates<typename Tile::Number>(gates);
  return result;
}

// Where a step stores what it makes of a sequence; null where it does not.
template <class Tile>
struct ForwardRows {
  typename Tile::Number* gates;
  typename Tile::Sum* cells;
  typename Tile::Number* y;
};

template <class Tile>
__device__ __forceinline__ ForwardRows<Tile> forward_rows(const LayerForward& layer, const ForwardDirection& to,
                                                          const Moment& moment, int64_t b) {
  using Number = typename Tile::Number;
  using Sum = typename Tile::Sum;
  ForwardRows<Tile> rows{};
  if (has_row(layer.gates_map, moment)) {
    if (to.gates) rows.gates = element<Number>(to.gates, layer.gates_map, moment.start, b, 0);
    if (to.cells) rows.cells = element<Sum>(to.cells, layer.cells_map, moment.start, b, 0);
  }
  if (has_row(layer.y_map, moment)) rows.y = element<Number>(to.y, layer.y_map, moment.start, b, 0);
  return rows;
}

template <class Tile, int N>
__device__ __forceinline__ void store_cells(const LayerForward& layer, const ForwardDirection& to,
                                            const ForwardRows<Tile>& rows, const Moment& moment, int64_t b,
                                            int64_t unit, const StoredCells<Tile, N>& cells, int valid) {
  using Number = typename Tile::Number;
  if (rows.gates) store_gates(rows.gates + unit, layer.shape.H, cells.gates, valid);
  if (rows.cells) store_units(rows.cells + unit, cells.c, valid);
  if (moment.last()) store_units(static_cast<Number*>(to.c_n) + b * layer.shape.H + unit, cells.c, valid);
}

template <class Tile, int N>
__device__ __forceinline__ void store_output(const LayerForward& layer, const ForwardDirection& to,
                                             const ForwardRows<Tile>& rows, const Moment& moment, int64_t b, int64_t p,
                                             const Units<typename Tile::Number, N>& h, int valid) {
  using Number = typename Tile::Number;
  Units<Number, N> y = h;
#pragma unroll
  for (int n = 0; n < N; ++n)
    if (!moment.active()) y.at[n] = narrow<Number>(typename Tile::Sum(0));
  if (rows.y) store_units(rows.y + p, y, valid);
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

// Where a step stores what it makes of a sequence; null where it does not.
template <class Tile>
struct BackwardRows {
  typename Tile::Number *d_gates, *d_h, *hidden_after;  // of hidden_prev the row of the step after
};

// kOptions: of a cell with options, which stores no hidden_prev there.
template <class Tile, bool kOptions>
__device__ __forceinline__ BackwardRows<Tile> backward_rows(const BackwardPass& pass, int d, const Moment& moment,
                                                            int64_t b) {
  using Number = typename Tile::Number;
  const BackwardOutputs& to = pass.outputs[d];
  BackwardRows<Tile> rows{};
  if (has_row(pass.d_gates_map, moment))
    rows.d_gates = element<Number>(to.d_gates, pass.d_gates_map, moment.start, b, 0);
  if (has_row(pass.h_map, moment) && to.d_h) rows.d_h = element<Number>(to.d_h, pass.h_map, moment.start, b, 0);
  if (!kOptions && moment.active() && !moment.last())
    rows.hidden_after = element<Number>(to.hidden_prev, pass.hidden_map, moment.start_after, b, 0);
  return rows;
}

// h that step s started from where no step before it stores it, and the gradient of its own.
template <class Tile, int N>
__device__ __forceinline__ void store_output_grads(const BackwardPass& pass, int d, const BackwardRows<Tile>& rows,
                                                   const Moment& moment, int64_t s, int64_t b, int64_t p,
                                                   const Units<typename Tile::Number, N>& d_h, int valid) {
  using Number = typename Tile::Number;
  const BackwardOutputs& to = pass.outputs[d];
  if (rows.d_h) store_units(rows.d_h + p, d_h, valid);
  if ((begins(moment, s) || pass.layer.shape.projected) && has_row(pass.h_map, moment)) {
    const bool from_h0 = s == 0 && moment.active() && !moment.forgets();
    Units<typename Tile::Sum, N> h;
#pragma unroll
    for (int n = 0; n < N; ++n)
      h.at[n] = from_h0 && n < valid ? state_at<Number>(pass.layer.direction[d].state.h0, b, p + n) : 0;
    store_units(element<Number>(to.h_prev, pass.h_map, moment.start, b, p), h, valid);
  }
}

// The same of a cell with options, whose steps each know the h that they started from, `before`.
template <class Tile, int N>
__device__ __forceinline__ void store_cell_output_grads(const BackwardPass& pass, int d, const BackwardRows<Tile>& rows,
                                                        const Moment& moment, int64_t b, int64_t p,
                                                        const Units<typename Tile::Sum, N>& before,
                                                        const Units<typename Tile::Number, N>& d_h, int valid) {
  using Number = typename Tile::Number;
  const BackwardOutputs& to = pass.outputs[d];
  if (!has_row(pass.h_map, moment)) return;
  store_units(element<Number>(to.h_prev, pass.h_map, moment.start, b, p), before, valid);
  if (rows.d_h) store_units(rows.d_h + p, d_h, valid);
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

// From the gradient of a unit's h; d_c is what is wanted of c from outside of the step, and then what the step before
// is to know.
template <class Tile>
__device__ __forceinline__ BackwardCell<typename Tile::Sum> backward_cell(
    const Moment& moment, const BackwardInputs<typename Tile::Sum>& inputs, typename Tile::Sum d_h,
    typename Tile::Sum& d_c) {
  using Sum = typename Tile::Sum;
  const Sum tanh_c = Tile::Math::tanh(inputs.c);
  const BackwardCell<Sum> counted{cell_backward(inputs.gates, inputs.c_prev, tanh_c, d_h, d_c + inputs.d_cells),
                                  inputs.gates.o * tanh_c};  // whether it counts or not: no branch
  const BackwardCell<Sum> cell = moment.active() ? counted : BackwardCell<Sum>{};
  d_c = moment.forgets() ? 0 : cell.grad.d_c_prev;
  return cell;
}

// The same where d_c is of the later steps alone.
template <class Tile>
__device__ __forceinline__ BackwardCell<typename Tile::Sum> backward_cell(
    const BackwardDirection& from, const Moment& moment, int64_t b, int64_t unit,
    const BackwardInputs<typename Tile::Sum>& inputs, typename Tile::Sum d_h, typename Tile::Sum& d_c) {
  if (moment.active() && moment.last()) d_c = state_at<typename Tile::Number>(from.dc_n, b, unit);
  return backward_cell<Tile>(moment, inputs, d_h, d_c);
}

// The gates' gradients as the step before is to know them.
template <class Sum>
__device__ __forceinline__ GateValues<Sum> carried_back(const Moment& moment, const BackwardCell<Sum>& cell) {
  return moment.forgets() ? GateValues<Sum>{} : cell.grad.d_pre;
}

// What a step back has made of N units, as it is stored.
template <class Tile, int N>
struct StoredGrads {
  GateUnits<typename Tile::Number, N> d_gates;
  Units<typename Tile::Number, N> hidden;
};

template <class Tile, int N>
__device__ __forceinline__ StoredGrads<Tile, N> stored_grads(const Units<BackwardCell<typename Tile::Sum>, N>& cells) {
  Units<GateValues<typename Tile::Sum>, N> d_gates;
  StoredGrads<Tile, N> result;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    d_gates.at[n] = cells.at[n].grad.d_pre;
    result.hidden.at[n] = narrow<typename Tile::Number>(cells.at[n].hidden);
  }
  result.d_gates = narrow_gates<typename Tile::Number>(d_gates);
  return result;
}

// kOptions: of a cell with options, whose h_prev is stored by store_cell_output_grads.
template <class Tile, bool kOptions, int N>
__device__ __forceinline__ void store_cell_grads(const BackwardPass& pass, int d, const BackwardRows<Tile>& rows,
                                                 const Moment& moment, int64_t s, int64_t b, int64_t unit,
                                                 const StoredGrads<Tile, N>& cells, int valid) {
  using Number = typename Tile::Number;
  using Sum = typename Tile::Sum;
  const BackwardOutputs& to = pass.outputs[d];
  Units<Number, N> carried_hidden = cells.hidden;
#pragma unroll
  for (int n = 0; n < N; ++n)
    if (moment.forgets_next()) carried_hidden.at[n] = narrow<Number>(Sum(0));
  if (rows.hidden_after) store_units(rows.hidden_after + unit, carried_hidden, valid);
  if (rows.d_gates) store_gates(rows.d_gates + unit, pass.layer.shape.H, cells.d_gates, valid);
  if (!to.hidden || !rows.d_gates) return;
  store_units(element<Number>(to.hidden, pass.hidden_map, moment.start, b, unit), cells.hidden, valid);
  if (!kOptions && begins(moment, s))
    store_units(element<Number>(to.hidden_prev, pass.hidden_map, moment.start, b, unit), Units<Sum, N>{}, valid);
}

}  // namespace lstm_ext::cuda
