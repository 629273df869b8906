// The rows of one step of a cell that normalises, forward: from the sums of h, lstm_ext/cell.py has the formulas.
#pragma once

#include "norm.cuh"

namespace lstm_ext::cuda {

template <class Tile, bool kOne>
class NormForwardRow : NormRow<Tile, kOne> {
  using Base = NormRow<Tile, kOne>;
  using Base::b_, Base::by_rows, Base::d_, Base::H_, Base::row_;
  using typename Base::Number, typename Base::Sum, typename Base::Four, typename Base::Scales;

 public:
  // Reads nothing that a launch of this layer writes.
  __device__ __forceinline__ NormForwardRow(const NormForward& params, int d, int64_t b)
      : Base(params.norm, params.cell.tensorflow, params.layer.shape, params.rows, d, b),
        params_(params),
        layer_(params.layer),
        to_(params.layer.direction[d]),
        step_(params.cell, d),
        moment_(moment_at(layer_.masks, layer_.gates_map.packed_offset, layer_.shape.T, to_.reverse, params.s, b)),
        rows_(forward_rows<Tile>(layer_, to_, moment_, b)) {
    if constexpr (kOne) this->for_units([&](int64_t u) { weights_ = load_weights(u); });
  }

  __device__ __forceinline__ void take() {
    Moments<Sum> of_c{};
    if constexpr (kOne) this->for_units([&](int64_t u) { read_ = load(u); });
    this->make_units([&](int64_t u) { return moment_.active() ? gate_sums(u) : Four{}; });
    if (moment_.active()) {
      const auto moments = this->moments_of_gates();
      this->change_units([&](int64_t u, Four& unit) { open_gates(u, moments, unit); });
      of_c = this->template moments_of<0>();
    }
    this->read_units([&](int64_t u, const Four& unit) { finish(u, of_c, unit.at[0], unit.at[1]); });
  }

 private:
  // Of a unit: what is the same at all steps, and what is read at this one. With kOne a thread reads both only once:
  // the former before the launch before has ended, the latter before the block's first barrier.
  struct Weights {
    Scales scales;
    Four beta;
    GateValues<Sum> bias, peephole;
  };
  __device__ __forceinline__ Weights load_weights(int64_t u) const {
    return {this->scales(u), this->beta(u), cell_bias_of<Tile>(to_.weights, H_, u), step_.peephole(u)};
  }
  struct Read {
    GateValues<Sum> inputs;  // what x brings to the sums, without the biases
    Sum c;                   // the state that the step starts from
  };
  __device__ __forceinline__ Read load(int64_t u) const {
    if (!moment_.active()) return {};
    return {read_gates<Sum>(params_.xw[d_], layer_.gates_map, moment_.start, b_, H_, u), c_before(u)};
  }
  __device__ __forceinline__ Weights weights(int64_t u) const {
    return this->kept_or(weights_, [&] { return load_weights(u); });
  }
  __device__ __forceinline__ Read read(int64_t u) const {
    return this->kept_or(read_, [&] { return load(u); });
  }
  __device__ __forceinline__ GateValues<Sum> inputs(int64_t u) const {
    return step_.in_cells_order(plus(read(u).inputs, weights(u).bias));
  }

  // What is normalised.
  __device__ __forceinline__ Four gate_sums(int64_t u) const {
    const Four sums = this->gates_at(row_, u);
    if (by_rows()) return sums;
    const auto [i, f, g, o] = inputs(u);
    return {sums.at[0] + i, sums.at[1] + f, sums.at[2] + g, sums.at[3] + o};
  }

  // The gates, from their sums, and what they make of c: that and o the unit remembers.
  __device__ __forceinline__ void open_gates(int64_t u, const Units<Moments<Sum>, 4>& moments, Four& unit) const {
    const Weights weights = this->weights(u);
    Four pre;
#pragma unroll
    for (int n = 0; n < 4; ++n) pre.at[n] = weights.scales.gamma.at[n] * moments.at[n].normalised(unit.at[n]);
    if (by_rows()) {
      const auto [i, f, g, o] = inputs(u);
      pre = {pre.at[0] + i, pre.at[1] + f, pre.at[2] + g, pre.at[3] + o};
    } else {
#pragma unroll
      for (int n = 0; n < 4; ++n) pre.at[n] += weights.beta.at[n];
    }
    const Place at = place_of<Tile>(params_, moment_, d_, b_, u);
    const CellState<Sum> made =
        step_
            .template made_by_gates<1>(at, {{weights.peephole}}, {{{pre.at[0], pre.at[1], pre.at[2], pre.at[3]}}},
                                       {{read(u).c}})
            .at[0];
    store_gates(u, made.gates);
    unit = {made.c, made.gates.o, 0, 0};
  }

  __device__ __forceinline__ void finish(int64_t u, const Moments<Sum>& of_c, Sum made, Sum o) const {
    if (params_.s == 0 && length_of(layer_.masks, layer_.shape.T, b_) == 0) keep_initial_state(u);
    Sum c = 0;
    Units<Sum, 1> out{};
    if (moment_.active()) {
      const Place at = place_of<Tile>(params_, moment_, d_, b_, u);
      const Sum seen = weights(u).scales.seen(of_c.normalised(made));
      c = step_.c_left(at, read(u).c, by_rows() ? made : seen);
      out.at[0] = o * step_.activated(seen);
      if (!layer_.shape.projected) out.at[0] = step_h<Tile>(params_, moment_, at, d_, out.at[0]);
    } else {
      store_gates(u, {});
    }
    if (rows_.cells) rows_.cells[u] = c;
    if (moment_.last()) static_cast<Number*>(to_.c_n)[b_ * H_ + u] = narrow<Number>(c);
    state(u) = carried(moment_, c);
    if (params_.hidden) {
      static_cast<Number*>(params_.hidden)[(d_ * layer_.shape.B + b_) * H_ + u] = narrow<Number>(out.at[0]);
    } else {
      store_output(layer_, to_, rows_, moment_, b_, u, narrow_units<Number>(out), 1);
    }
  }

  __device__ __forceinline__ void keep_initial_state(int64_t u) const {
    static_cast<Number*>(to_.c_n)[b_ * H_ + u] = narrow<Number>(state_at<Number>(to_.state.c0, b_, u));
    if (!layer_.shape.projected) keep_initial_h<Tile>(layer_, to_, b_, u);
  }

  __device__ __forceinline__ void store_gates(int64_t u, const GateValues<Sum>& gates) const {
    if (rows_.gates)
      cuda::store_gates(rows_.gates + u, H_, narrow_gates<Number>(Units<GateValues<Sum>, 1>{{gates}}), 1);
  }

  __device__ __forceinline__ Sum& state(int64_t u) const {
    return static_cast<Sum*>(params_.state)[(d_ * layer_.shape.B + b_) * H_ + u];
  }
  __device__ __forceinline__ Sum c_before(int64_t u) const {
    if (moment_.forgets()) return 0;
    return params_.s == 0 ? state_at<Number>(to_.state.c0, b_, u) : state(u);
  }

  const NormForward& params_;
  const LayerForward& layer_;
  const ForwardDirection& to_;
  const CellStep<Tile, false> step_;
  const Moment moment_;
  const ForwardRows<Tile> rows_;
  Weights weights_;  // kOne: both are of the thread's unit
  Read read_;
};

template <class Tile>
__global__ void __launch_bounds__(most_row_threads(sizeof(typename Tile::Sum)), 1)
    norm_forward(const __grid_constant__ NormForward params) {
  take_row<NormForwardRow, Tile>(params, params.layer.shape.H);
}

// h as steps found it and multiplied it, a row of a step at a time.
template <class Tile>
__global__ void __launch_bounds__(most_row_threads(sizeof(typename Tile::Sum)), 1)
    norm_h_before(const __grid_constant__ WithCell<StepsBefore> params) {
  using Number = typename Tile::Number;
  wait_for_previous_launch();
  let_next_launch_start();
  const int d = blockIdx.y;
  const SequenceShape& shape = params.shape;
  const auto& of = params.direction[d];
  const CellStep<Tile, false> step(params.cell, d);
  for (int64_t row = blockIdx.x; row < params.steps * shape.B; row += gridDim.x) {
    const int64_t s = row / shape.B, b = row % shape.B;
    const Moment moment = moment_at(params.masks, params.packed_offset, shape.T, of.reverse, s, b);
    if (!has_row(params.h_map, moment)) continue;
    Number* const to = element<Number>(of.h, params.h_map, moment.start, b, 0);
    for (int64_t p = threadIdx.x; p < shape.P; p += blockDim.x)
      to[p] = narrow<Number>(step.template h_before<1>(of.state, moment, s, {0, b, p}, 1).at[0]);
  }
}

}  // namespace lstm_ext::cuda
