// The rows of one step of a cell that normalises, forward: from the sums of h, lstm_ext/cell.py has the formulas.
#pragma once

#include "norm.cuh"

namespace lstm_ext::cuda {

template <class Tile>
class NormForwardRow : NormRow<Tile> {
  using Base = NormRow<Tile>;
  using Base::b_, Base::by_rows, Base::d_, Base::H_, Base::row_;
  using typename Base::Number, typename Base::Sum, typename Base::Four;

 public:
  __device__ __forceinline__ NormForwardRow(const NormForward& params, int d, int64_t b)
      : Base(params.norm, params.cell.tensorflow, params.layer.shape, params.rows, d, b),
        params_(params),
        layer_(params.layer),
        to_(params.layer.direction[d]),
        step_(params.cell, d),
        moment_(moment_at(layer_.masks, layer_.gates_map.packed_offset, layer_.shape.T, to_.reverse, params.s, b)),
        rows_(forward_rows<Tile>(layer_, to_, moment_, b)) {}

  __device__ __forceinline__ void take() {
    Moments<Sum> of_c{};
    if (moment_.active()) {
      if (!by_rows()) this->for_units([&](int64_t u) { add_inputs(u); });
      const auto moments = this->moments_of_gates([&](int64_t u) { return this->gates_at(row_, u); });
      this->for_units([&](int64_t u) { open_gates(u, moments); });
      of_c = this->moments_of(row_);
    }
    this->for_units([&](int64_t u) { finish(u, of_c); });
  }

 private:
  // What x brings to the sums, and the biases.
  __device__ __forceinline__ GateValues<Sum> inputs(int64_t u) const {
    return plus(read_gates<Sum>(params_.xw[d_], layer_.gates_map, moment_.start, b_, H_, u),
                cell_bias_of<Tile>(to_.weights, H_, u));
  }
  __device__ __forceinline__ void add_inputs(int64_t u) const {
    const auto [i, f, g, o] = inputs(u);
    row_[u] += i;
    row_[H_ + u] += f;
    row_[2 * H_ + u] += g;
    row_[3 * H_ + u] += o;
  }

  // The gates, and what they make of c: that and o stay in the row.
  __device__ __forceinline__ void open_gates(int64_t u, const typename Base::GateMoments& moments) const {
    const Four sums = this->gates_at(row_, u);
    Four pre;
#pragma unroll
    for (int n = 0; n < 4; ++n) pre.at[n] = this->gamma(n, u) * moments.at[n].normalised(sums.at[n]);
    if (by_rows()) {
      const auto [i, f, g, o] = step_.in_cells_order(inputs(u));
      pre = {pre.at[0] + i, pre.at[1] + f, pre.at[2] + g, pre.at[3] + o};
    } else {
#pragma unroll
      for (int n = 0; n < 4; ++n) pre.at[n] += this->beta(n, u);
    }
    const Place at = place_of<Tile>(params_, moment_, d_, b_, u);
    const CellState<Sum> made =
        step_.made_by_gates(at, step_.peephole(u), {pre.at[0], pre.at[1], pre.at[2], pre.at[3]}, c_before(u));
    store_gates(u, made.gates);
    row_[u] = made.c;
    row_[H_ + u] = made.gates.o;
  }

  __device__ __forceinline__ void finish(int64_t u, const Moments<Sum>& of_c) const {
    if (params_.s == 0 && length_of(layer_.masks, layer_.shape.T, b_) == 0) keep_initial_state(u);
    Sum c = 0;
    Units<Sum, 1> out{};
    if (moment_.active()) {
      const Place at = place_of<Tile>(params_, moment_, d_, b_, u);
      const Sum made = row_[u], seen = this->seen(of_c.normalised(made), u);
      c = step_.c_left(at, c_before(u), by_rows() ? made : seen);
      out.at[0] = row_[H_ + u] * step_.activated(seen);
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
};

template <class Tile>
__global__ void __launch_bounds__(kMostRowThreads) norm_forward(const __grid_constant__ NormForward params) {
  wait_for_previous_launch();
  let_next_launch_start();
  NormForwardRow<Tile>(params, blockIdx.y, blockIdx.x).take();
}

// h as steps found it and multiplied it, a row of a step at a time.
template <class Tile>
__global__ void __launch_bounds__(kMostRowThreads) norm_h_before(const __grid_constant__ WithCell<StepsBefore> params) {
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
