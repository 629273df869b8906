// The pointwise part of a cell with options, where pointwise.cuh has that of the plain LSTM: by cell_math.h, in the
// order of lstm_ext/cell.py. Which options there are is told at run time, and is the same for all threads.
//
// In TensorFlow's layout the gates' sums, their gradients and the rows of the weights are in the order i g f o, so that
// all products are of rows as they lie; what a forward pass saves is in the order i f g o all the same.
#pragma once

#include <type_traits>

#include "../cell_math.h"
#include "pointwise.cuh"

namespace lstm_ext::cuda {

// Where a unit of h or of c stands, for its random numbers: time in the caller's order, row of the batch, unit.
struct Place {
  int64_t t, b, unit;
  const DrawKeys* keys = nullptr;  // with which t does not count
};

// kKeyed: whether places have the keys of their random numbers.
template <class Tile, bool kKeyed>
class CellStep {
 public:
  using Number = typename Tile::Number;
  using Sum = typename Tile::Sum;
  using Math = typename Tile::Math;

  // Of direction d of a layer.
  __device__ __forceinline__ CellStep(const KernelCell& cell, int d) : cell_(cell), d_(d) {}

  // The time of a step that is within the length. `rows` are those by which the moments were found.
  static __device__ __forceinline__ int64_t time_of(const Moment& moment, const RowMap& rows, const Masks& masks,
                                                    int64_t T, bool reverse, int64_t s, int64_t b) {
    if (!rows.packed_offset) return moment.start;
    return reverse ? length_of(masks, T, b) - 1 - s : s;
  }

  __device__ __forceinline__ bool draws() const { return cell_.draws; }

  // Of row b, as of what may be drawn at all. Recurrent dropout has one mask for all times, and for rows without any.
  __device__ __forceinline__ DrawKeys keys_of(const Moment& moment, int64_t t, int64_t b) const {
    DrawKeys keys = {};
    const auto find = [&](bool possible, Draw draw, int64_t at) {
      if (possible) keys.of[static_cast<int>(draw)] = key_of(draw, at, b);
    };
    find(cell_.recurrent.possible, Draw::kRecurrentDropout, 0);
    if (!moment.active()) return keys;
    find(cell_.candidate.possible, Draw::kCandidateDropout, t);
    find(cell_.zoneout_h.draws && cell_.zoneout_h.wanted, Draw::kZoneoutH, t);
    find(cell_.zoneout_c.draws && cell_.zoneout_c.wanted, Draw::kZoneoutC, t);
    return keys;
  }

  __device__ __forceinline__ bool keeps_h() const { return cell_.zoneout_h.wanted; }
  __device__ __forceinline__ bool drops_h() const { return cell_.recurrent.possible; }

  // Of i, f and o of a unit; zeros where there is none.
  __device__ __forceinline__ GateValues<Sum> peephole(int64_t unit) const {
    const Matrix& from = cell_.direction[d_].peephole;
    if (!from.data) return {0, 0, 0, 0};
    const auto row = [&](int n) { return widen(static_cast<const Number*>(from.data)[n * from.row_stride + unit]); };
    return {row(0), row(1), 0, row(2)};
  }

  // What h is multiplied by before its products: one mask for all times.
  __device__ __forceinline__ Sum h_mask(const Place& at) const {
    return mask(cell_.recurrent, Draw::kRecurrentDropout, numbers().h_scale, {0, at.b, at.unit, at.keys});
  }
  // And g before it is added to c.
  __device__ __forceinline__ Sum g_mask(const Place& at) const {
    return mask(cell_.candidate, Draw::kCandidateDropout, numbers().g_scale, at);
  }

  // Gates i f g o from the order of the weights, and the way back.
  __device__ __forceinline__ GateValues<Sum> in_cells_order(const GateValues<Sum>& gates) const {
    return cell_.tensorflow ? swapped(gates) : gates;
  }

  // ---- Forward ------------------------------------------------------------------------------------------------------

  // One step of N adjacent units from their gates' sums, in the order of the weights; `at` is the first one's place, c
  // are the states that they start from, and `hidden` becomes their h before a projection, a clip and zoneout.
  template <int N>
  __device__ __forceinline__ Units<CellState<Sum>, N> forward(const Moment& moment, const Place& at,
                                                              const Units<GateValues<Sum>, N>& peephole,
                                                              Units<Pre<Tile>, N> pre, const Units<Sum, N>& c,
                                                              Units<Sum, N>& hidden) const {
    Units<CellState<Sum>, N> cells{};
    hidden = {};
    if (!moment.active()) return cells;
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (cell_.tensorflow) pre.at[n] = swapped(pre.at[n]);
    with_activations([&](const auto& of_gate, const auto& of_unit) {
      cells = made_by_gates<N>(of_gate, of_unit, at, peephole, pre, c);
#pragma unroll
      for (int n = 0; n < N; ++n) hidden.at[n] = cells.at[n].c;
      of_unit.apply(hidden);
    });
#pragma unroll
    for (int n = 0; n < N; ++n) {
      hidden.at[n] *= cells.at[n].gates.o;
      cells.at[n].c = c_left(behind(at, n), c.at[n], cells.at[n].c);
    }
    return cells;
  }

  // The gates of N adjacent units, from their sums i f g o, and what they make of c.
  template <int N>
  __device__ __forceinline__ Units<CellState<Sum>, N> made_by_gates(const Place& at,
                                                                    const Units<GateValues<Sum>, N>& peephole,
                                                                    const Units<Pre<Tile>, N>& pre,
                                                                    const Units<Sum, N>& c) const {
    Units<CellState<Sum>, N> made;
    with_activations([&](const auto& of_gate, const auto& of_unit) {
      made = made_by_gates<N>(of_gate, of_unit, at, peephole, pre, c);
    });
    return made;
  }

  __device__ __forceinline__ Sum activated(Sum c) const { return activate<Math>(numbers().activation, c); }
  template <int N>
  __device__ __forceinline__ Units<Sum, N> activated(Units<Sum, N> c) const {
    with_activations([&](const auto&, const auto& of_unit) { of_unit.apply(c); });
    return c;
  }

  // c as a step leaves it, from c before it and what it has made of that.
  __device__ __forceinline__ Sum c_left(const Place& at, Sum before, Sum made) const {
    return next(cell_.zoneout_c, Draw::kZoneoutC, numbers().zoneout_c, at, before, made);
  }

  // h as a step leaves it, from what the step has computed and h before it.
  __device__ __forceinline__ Sum output(const Place& at, bool projected, Sum h_before, Sum computed) const {
    if (projected) computed = clipped(computed, numbers().proj_clip);
    return next(cell_.zoneout_h, Draw::kZoneoutH, numbers().zoneout_h, at, h_before, computed);
  }

  // ---- Backward -----------------------------------------------------------------------------------------------------

  // h of N units, of which `valid` are there, as step s found and multiplied it; y is of the forward pass.
  template <int N>
  __device__ __forceinline__ Units<Sum, N> h_before(const InitialState& state, const Moment& moment, int64_t s,
                                                    const Place& at, int valid) const {
    Units<Sum, N> h{};
    if (!moment.active() || moment.forgets()) return h;
    if (s == 0) {
      h = units_of_state<N, Number>(state.h0, at.b, at.unit, valid);
    } else {
      const Number* y = element<Number>(cell_.direction[d_].y, cell_.y_map, moment.start_before, at.b, at.unit);
      const auto before = bits_as<Units<Number, N>>(load_units<N>(y, valid));
#pragma unroll
      for (int n = 0; n < N; ++n) h.at[n] = widen(before.at[n]);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) h.at[n] *= h_mask(behind(at, n));
    return h;
  }

  // Of the gradient of h as a step left it: `kept` becomes what goes past the step; what is returned is the gradient of
  // what the step has computed, before a clip.
  __device__ __forceinline__ Sum output_backward(const Moment& moment, const Place& at, bool projected, Sum d_h,
                                                 Sum& kept) const {
    kept = 0;
    if (!moment.active()) return 0;
    const CellNumbers<Sum>& number = numbers();
    const Sum passed = next(cell_.zoneout_h, Draw::kZoneoutH, number.zoneout_h, at, Sum(0), d_h);
    if (!moment.forgets()) kept = kept_part(cell_.zoneout_h, Draw::kZoneoutH, number.zoneout_h, at, d_h);
    if (!projected || !(number.proj_clip > 0)) return passed;
    const Sum y = widen(*element<Number>(cell_.direction[d_].y, cell_.y_map, moment.start, at.b, at.unit));
    return is_cut(y, widen(narrow<Number>(number.proj_clip))) ? 0 : passed;  // y is as exact
  }

  // As backward_cell, of N adjacent units of which `valid` are there; `at` is the first one's place. `d_h` are of the
  // hidden units; c as the gates left it, and as they found it, are stored.
  template <int N>
  __device__ __forceinline__ Units<BackwardCell<Sum>, N> backward(
      const BackwardDirection& from, const Moment& moment, const Place& at, const Units<GateValues<Sum>, N>& peephole,
      const RowMap& rows, const Units<BackwardInputs<Sum>, N>& inputs, const Units<Sum, N>& d_h, Units<Sum, N>& d_c,
      int valid) const {
    Units<BackwardCell<Sum>, N> cells{};
    Units<Sum, N> c_prev{}, new_c{};
    if (moment.active()) {
      const CellNumbers<Sum>& number = numbers();
      Units<Sum, N> mask, raw_c, out;
      Units<CGrad, N> of_c;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const Place place = behind(at, n);
        mask.at[n] = g_mask(place);
        raw_c.at[n] = c_before_clip(inputs.at[n], mask.at[n], false);
        out.at[n] = new_c.at[n] = clipped(raw_c.at[n], number.cell_clip);
        c_prev.at[n] = inputs.at[n].c_prev;
        if (moment.last()) d_c.at[n] = n < valid ? state_at<Number>(from.dc_n, at.b, place.unit) : 0;
        of_c.at[n] = c_backward(place, d_c.at[n] + inputs.at[n].d_cells);
      }
      with_activations([&](const auto& of_gate, const auto& of_unit) {
        of_unit.apply(out);
#pragma unroll
        for (int n = 0; n < N; ++n)
          cells.at[n] = gates_backward<true>(of_gate, of_unit, peephole.at[n], inputs.at[n],
                                             {mask.at[n], raw_c.at[n], out.at[n]}, d_h.at[n], of_c.at[n]);
      });
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (n >= valid) cells.at[n] = {};
      d_c.at[n] = moment.forgets() ? 0 : cells.at[n].grad.d_c_prev;
      GateValues<Sum>& grad = cells.at[n].grad.d_pre;
      if (cell_.tensorflow) grad = swapped(grad);
    }
    store_cells(moment, at, rows, c_prev, new_c, valid);
    return cells;
  }

  // c as the gates of a step made it, before a clip. `left_other`: the step left something else for another reason than
  // zoneout.
  __device__ __forceinline__ Sum c_before_clip(const BackwardInputs<Sum>& inputs, Sum mask, bool left_other) const {
    return cell_.zoneout_c.wanted || left_other ? unclipped_c(inputs.gates, mask, inputs.c_prev) : inputs.c;
  }
  __device__ __forceinline__ Sum d_activated(Sum out) const { return d_activation<Math>(numbers().activation, out); }
  __device__ __forceinline__ Sum c_clipped(Sum raw_c) const { return clipped(raw_c, numbers().cell_clip); }

  // Of the gradient of c as a step left it: what goes past the step, and what is of c as the step made it.
  struct CGrad {
    Sum kept, made;
  };
  __device__ __forceinline__ CGrad c_backward(const Place& at, Sum d_c) const {
    const Sum share = numbers().zoneout_c;
    return {kept_part(cell_.zoneout_c, Draw::kZoneoutC, share, at, d_c),
            next(cell_.zoneout_c, Draw::kZoneoutC, share, at, Sum(0), d_c)};
  }

  // What a step computed on its way: the mask of g, c before a clip, and what o is multiplied by.
  struct Computed {
    Sum g_mask, raw_c, out;
  };
  // From the gradients of the hidden unit and of c as the step made it: those of the gates' sums i f g o. kAddsOut:
  // what comes to c through the hidden unit is not in the latter.
  template <bool kAddsOut>
  __device__ __forceinline__ BackwardCell<Sum> gates_backward(const GateValues<Sum>& peephole,
                                                              const BackwardInputs<Sum>& inputs,
                                                              const Computed& computed, Sum d_h, CGrad of_c) const {
    BackwardCell<Sum> cell;
    with_activations([&](const auto& of_gate, const auto& of_unit) {
      cell = gates_backward<kAddsOut>(of_gate, of_unit, peephole, inputs, computed, d_h, of_c);
    });
    return cell;
  }

  // For the gradients of a peephole.
  template <int N>
  __device__ __forceinline__ void store_cells(const Moment& moment, const Place& at, const RowMap& rows,
                                              const Units<Sum, N>& c_prev, const Units<Sum, N>& c_new,
                                              int valid) const {
    const CellOutputs& to = cell_.direction[d_].outputs;
    if (!to.c_prev || !has_row(rows, moment)) return;
    store_units(element<Sum>(to.c_prev, rows, moment.start, at.b, at.unit), c_prev, valid);
    store_units(element<Sum>(to.c_new, rows, moment.start, at.b, at.unit), c_new, valid);
  }

 private:
  // An activation of several units and its derivative, from an output. Those of the plain LSTM stand in the code, so
  // that instructions of all units go side by side; of others the choice is made anew for each use.
  struct Sigmoid {
    template <int N>
    __device__ __forceinline__ void apply(Units<Sum, N>& x) const {
#pragma unroll
      for (int n = 0; n < N; ++n) x.at[n] = sigmoid<Math>(x.at[n]);
    }
    __device__ __forceinline__ Sum derivative(Sum output) const { return d_sigmoid(output); }
  };
  struct Tanh {
    template <int N>
    __device__ __forceinline__ void apply(Units<Sum, N>& x) const {
#pragma unroll
      for (int n = 0; n < N; ++n) x.at[n] = Math::tanh(x.at[n]);
    }
    __device__ __forceinline__ Sum derivative(Sum output) const { return d_tanh(output); }
  };
  struct Chosen {
    const typename CellNumbers<Sum>::Spec& spec;
    template <int N>
    __device__ __forceinline__ void apply(Units<Sum, N>& x) const {
      with_activation<Math>(spec, [&](const auto& activation) {
#pragma unroll
        for (int n = 0; n < N; ++n) x.at[n] = activation(x.at[n]);
      });
    }
    __device__ __forceinline__ Sum derivative(Sum output) const { return d_activation<Math>(spec, output); }
  };

  // Calls body(that of the gates, that of candidate and output).
  template <class Body>
  __device__ __forceinline__ void with_activations(const Body& body) const {
    const CellNumbers<Sum>& number = numbers();
    if (number.recurrent_activation.kind == Activation::kSigmoid && number.activation.kind == Activation::kTanh) {
      body(Sigmoid(), Tanh());
    } else {
      body(Chosen{number.recurrent_activation}, Chosen{number.activation});
    }
  }

  // The place of the unit that is n behind.
  static __device__ __forceinline__ Place behind(const Place& at, int n) { return {at.t, at.b, at.unit + n, at.keys}; }

  // The gates of N units and what they make of c; c as it is left, and without zoneout.
  template <int N, class OfGate, class OfUnit>
  __device__ __forceinline__ Units<CellState<Sum>, N> made_by_gates(const OfGate& of_gate, const OfUnit& of_unit,
                                                                    const Place& at,
                                                                    const Units<GateValues<Sum>, N>& peephole,
                                                                    const Units<Pre<Tile>, N>& pre,
                                                                    const Units<Sum, N>& c) const {
    const CellNumbers<Sum>& number = numbers();
    const bool has_peephole = cell_.direction[d_].peephole.data;
    Units<Sum, 2 * N> f_and_i;
    Units<Sum, N> g, o;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      f_and_i.at[n] = pre.at[n].f + number.forget_bias;
      f_and_i.at[N + n] = pre.at[n].i;
      g.at[n] = pre.at[n].g;
      o.at[n] = pre.at[n].o;
      if (has_peephole) {
        f_and_i.at[n] += peephole.at[n].f * c.at[n];
        f_and_i.at[N + n] += peephole.at[n].i * c.at[n];
      }
    }
    of_gate.apply(f_and_i);
    of_unit.apply(g);
    Units<CellState<Sum>, N> made;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      GateValues<Sum>& gates = made.at[n].gates;
      gates = {cell_.coupled ? 1 - f_and_i.at[n] : f_and_i.at[N + n], f_and_i.at[n], g.at[n], 0};
      made.at[n].c = clipped(unclipped_c(gates, g_mask(behind(at, n)), c.at[n]), number.cell_clip);
      if (has_peephole) o.at[n] += peephole.at[n].o * made.at[n].c;
    }
    of_gate.apply(o);
#pragma unroll
    for (int n = 0; n < N; ++n) made.at[n].gates.o = o.at[n];
    return made;
  }

  template <bool kAddsOut, class OfGate, class OfUnit>
  __device__ __forceinline__ BackwardCell<Sum> gates_backward(const OfGate& of_gate, const OfUnit& of_unit,
                                                              const GateValues<Sum>& peephole,
                                                              const BackwardInputs<Sum>& inputs,
                                                              const Computed& computed, Sum d_h, CGrad of_c) const {
    const CellNumbers<Sum>& number = numbers();
    const auto [i, f, g, o] = inputs.gates;
    const Sum mask = computed.g_mask;
    Sum d_new = of_c.made;
    const bool has_peephole = cell_.direction[d_].peephole.data;
    GateValues<Sum> grad;
    grad.o = d_h * computed.out * of_gate.derivative(o);
    if constexpr (kAddsOut) d_new += d_h * o * of_unit.derivative(computed.out);
    if (has_peephole) d_new += grad.o * peephole.o;
    if (number.cell_clip > 0 && is_cut(computed.raw_c, number.cell_clip)) d_new = 0;
    grad.g = d_new * i * mask * of_unit.derivative(g);
    const Sum of_i = d_new * (g * mask), of_f = d_new * inputs.c_prev;
    grad.i = cell_.coupled ? 0 : of_i * of_gate.derivative(i);
    grad.f = (cell_.coupled ? of_f - of_i : of_f) * of_gate.derivative(f);
    Sum d_c_prev = d_new * f + of_c.kept;
    if (has_peephole) d_c_prev += grad.i * peephole.i + grad.f * peephole.f;
    return {{grad, d_c_prev}, o * computed.out};
  }

  __device__ __forceinline__ const CellNumbers<Sum>& numbers() const {
    if constexpr (std::is_same_v<Sum, double>) {
      return cell_.twice;
    } else {
      return cell_.single;
    }
  }

  static __device__ __forceinline__ GateValues<Sum> swapped(const GateValues<Sum>& gates) {
    return {gates.i, gates.g, gates.f, gates.o};
  }

  static __device__ __forceinline__ Sum unclipped_c(const GateValues<Sum>& gates, Sum mask, Sum c_prev) {
    return gates.f * c_prev + gates.i * (gates.g * mask);
  }
  static __device__ __forceinline__ Sum clipped(Sum value, Sum most) {
    if (!(most > 0)) return value;
    return value > most ? most : value < -most ? -most : value;  // NaN stays NaN
  }
  static __device__ __forceinline__ bool is_cut(Sum value, Sum most) { return value >= most || value <= -most; }

  __device__ __forceinline__ uint64_t key_of(Draw draw, int64_t t, int64_t b) const {
    return draw_key(static_cast<uint64_t>(*cell_.seed), draw, d_, t, b);
  }
  __device__ __forceinline__ bool happens(const Chance& chance, Draw draw, const Place& at) const {
    uint64_t key;
    if constexpr (kKeyed) {
      key = at.keys->of[static_cast<int>(draw)];
    } else {
      key = key_of(draw, at.t, at.b);
    }
    return draw_bits(key, static_cast<uint32_t>(at.unit)) <= chance.last;
  }
  __device__ __forceinline__ Sum mask(const Chance& dropped, Draw draw, Sum scale, const Place& at) const {
    if (!dropped.possible) return 1;
    return happens(dropped, draw, at) ? 0 : scale;
  }

  __device__ __forceinline__ Sum next(const Zoneout& zoneout, Draw draw, Sum share, const Place& at, Sum old,
                                      Sum value) const {
    if (!zoneout.wanted) return value;
    if (zoneout.draws) return zoneout.chance.possible && happens(zoneout.chance, draw, at) ? old : value;
    return share * old + (1 - share) * value;
  }
  // What part of a gradient of that goes to the old value; the rest is of the new one.
  __device__ __forceinline__ Sum kept_part(const Zoneout& zoneout, Draw draw, Sum share, const Place& at,
                                           Sum grad) const {
    if (!zoneout.wanted) return 0;
    if (zoneout.draws) return zoneout.chance.possible && happens(zoneout.chance, draw, at) ? grad : 0;
    return share * grad;
  }

  const KernelCell& cell_;
  const int d_;
};

// Both biases of a unit, or TensorFlow's, in the order of the weights.
template <class Tile>
__device__ __forceinline__ Pre<Tile> cell_bias_of(const LayerWeights& weights, int64_t H, int64_t unit) {
  if (weights.b_hh || !weights.b_ih) return bias_of<Tile>(weights, H, unit);
  const auto* at = static_cast<const typename Tile::Number*>(weights.b_ih) + unit;
  return {widen(at[0]), widen(at[H]), widen(at[2 * H]), widen(at[3 * H])};
}

}  // namespace lstm_ext::cuda
