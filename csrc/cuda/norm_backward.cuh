// The rows of one step of a cell that normalises, backward: from the gradient of h to those of what was normalised.
#pragma once

#include "norm.cuh"

namespace lstm_ext::cuda {

// The gradient of c between the launches of a unit.
template <class Tile>
__device__ __forceinline__ typename Tile::Sum* d_c_of(const StepBackward& params, int d, int64_t b, int64_t unit) {
  const SequenceShape& shape = params.pass.layer.shape;
  return static_cast<typename Tile::Sum*>(params.state) + (d * shape.B + b) * shape.H + unit;
}

template <class Tile>
class NormBackwardRow : NormRow<Tile> {
  using Base = NormRow<Tile>;
  using Base::b_, Base::by_rows, Base::d_, Base::H_, Base::row_;
  using typename Base::Number, typename Base::Sum, typename Base::Four;
  using Step = CellStep<Tile, false>;

 public:
  __device__ __forceinline__ NormBackwardRow(const NormBackward& params, int d, int64_t b)
      : Base(params.norm, params.cell.tensorflow, params.pass.layer.shape, params.rows, d, b),
        params_(params),
        layer_(params.pass.layer),
        from_(params.pass.layer.direction[d]),
        step_(params.cell, d),
        moment_(moment_at(layer_.masks, layer_.gates_map.packed_offset, layer_.shape.T, from_.reverse, params.s, b)),
        reads_(backward_reads<Tile>(params, d, moment_, b)),
        rows_(backward_rows<Tile, true>(params.pass, d, moment_, b)),
        to_(params.normed[d]),
        of_4H_(params.pass.d_gates_map.from_start(moment_.start, b)),
        of_H_(params.pass.hidden_map.from_start(moment_.start, b)),
        of_scale_(params.scales_map.from_start(moment_.start, b)) {}

  __device__ __forceinline__ void take() {
    if (!layer_.shape.projected) this->for_units([&](int64_t u) { find_d_h(u); });
    if (!moment_.active()) return this->for_units([&](int64_t u) { rest(u); });
    this->for_units([&](int64_t u) { make_c_again(u); });
    const Moments<Sum> of_c = this->moments_of(c());
    const Units<Sum, 2> of_seen = this->template total<2>([&](int64_t u) { return see(u, of_c); });
    const auto of_gates = this->template total<8>([&](int64_t u) { return differentiate(u, of_c, of_seen); });
    const Four d = this->means({of_gates.at[0], of_gates.at[1], of_gates.at[2], of_gates.at[3]});
    const Four along = this->means({of_gates.at[4], of_gates.at[5], of_gates.at[6], of_gates.at[7]});
    this->for_units([&](int64_t u) { finish(u, d, along); });
  }

 private:
  // What a unit remembers, in the four parts of the row: the gradient of its h, c as the gates made it, the gradient of
  // the normalised c, and what o is multiplied by.
  __device__ __forceinline__ Sum& d_h(int64_t u) const { return row_[u]; }
  __device__ __forceinline__ Sum* c() const { return row_ + H_; }
  __device__ __forceinline__ Sum& d_normed_c(int64_t u) const { return row_[2 * H_ + u]; }
  __device__ __forceinline__ Sum& out(int64_t u) const { return row_[3 * H_ + u]; }

  // From what the product has left there.
  __device__ __forceinline__ void find_d_h(int64_t u) const {
    Number dy = narrow<Number>(Sum(0));
    if (reads_.dy) dy = reads_.dy[u];
    const Sum from_next_step = d_h_of_cell<Tile>(params_, d_, b_, u, d_h(u));
    const Sum of_h = backward_output<Number>(from_, moment_, b_, u, from_next_step, widen(dy));
    d_h(u) = cell_output_backward<Tile>(params_, rows_, moment_, d_, b_, u, of_h);
  }

  // What the forward pass left of a unit.
  struct Unit {
    Place at;
    BackwardInputs<Sum> inputs;
    Sum d_c, g_mask, raw_c;
  };
  __device__ __forceinline__ Unit unit(int64_t u) const {
    const auto loaded =
        load_cell_backward<Tile, 1>(params_, reads_, moment_, d_, b_, u, 1, d_c_of<Tile>(params_, d_, b_, u));
    const BackwardInputs<Sum> inputs = loaded.inputs(0);
    const Place at = place_of<Tile>(params_, moment_, d_, b_, u);
    const Sum d_c = moment_.last() ? state_at<Number>(from_.dc_n, b_, u) : loaded.d_c.at[0];
    const Sum mask = step_.g_mask(at);
    return {at, inputs, d_c + inputs.d_cells, mask, step_.c_before_clip(inputs, mask, !by_rows())};
  }

  __device__ __forceinline__ void make_c_again(int64_t u) const { c()[u] = step_.c_clipped(unit(u).raw_c); }

  // The gradient of c as the output sees it; what goes into that of the normalised c.
  __device__ __forceinline__ Units<Sum, 2> see(int64_t u, const Moments<Sum>& of_c) const {
    const Unit unit = this->unit(u);
    const Sum normed = of_c.normalised(c()[u]);
    out(u) = step_.activated(this->seen(normed, u));
    Sum d_seen = d_h(u) * unit.inputs.gates.o * step_.d_activated(out(u));
    if (!by_rows()) d_seen += step_.c_backward(unit.at, unit.d_c).made;
    if (to_.d_seen) {
      static_cast<Sum*>(to_.d_seen)[of_H_ + u] = d_seen;
      static_cast<Sum*>(to_.d_gamma_h)[of_H_ + u] = d_seen * normed;
    }
    d_normed_c(u) = d_seen * this->gamma_h(u);
    return {{d_normed_c(u), d_normed_c(u) * normed}};
  }

  // The gradients of the gates before their activation, and of c before the step; what goes into those of the sums.
  __device__ __forceinline__ Units<Sum, 8> differentiate(int64_t u, const Moments<Sum>& of_c,
                                                         const Units<Sum, 2>& of_seen) const {
    const Unit unit = this->unit(u);
    const Sum H = static_cast<Sum>(H_), normed_c = of_c.normalised(c()[u]);
    const Sum d_c = of_c.scale * (d_normed_c(u) - of_seen.at[0] / H - normed_c * (of_seen.at[1] / H));
    typename Step::CGrad grad = step_.c_backward(unit.at, unit.d_c);
    grad.made = by_rows() ? grad.made + d_c : d_c;
    const BackwardCell<Sum> cell = step_.template gates_backward<false>(
        step_.peephole(u), unit.inputs, {unit.g_mask, unit.raw_c, out(u)}, d_h(u), grad);
    keep_d_c(u, moment_.forgets() ? 0 : cell.grad.d_c_prev);
    store_hidden(u, cell.hidden);
    step_.template store_cells<1>(moment_, unit.at, params_.pass.hidden_map, {{unit.inputs.c_prev}}, {{c()[u]}}, 1);
    const Four d_pre{cell.grad.d_pre.i, cell.grad.d_pre.f, cell.grad.d_pre.g, cell.grad.d_pre.o};
    Units<Sum, 8> sums;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int64_t at = of_4H_ + this->place(n, u);
      static_cast<Sum*>(to_.d_pre)[at] = d_pre.at[n];
      sums.at[n] = d_pre.at[n] * this->gamma(n, u);
      sums.at[4 + n] = sums.at[n] * static_cast<const Sum*>(to_.normed)[at];
    }
    return sums;
  }

  // Of the sums: by the means of their gradients, and of those times what they were normalised to.
  __device__ __forceinline__ void finish(int64_t u, const Four& mean, const Four& along) const {
    const Sum* scales = static_cast<const Sum*>(to_.scales) + of_scale_;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int64_t at = this->place(n, u);
      Sum& normed = static_cast<Sum*>(to_.normed)[of_4H_ + at];
      const Sum d_pre = static_cast<const Sum*>(to_.d_pre)[of_4H_ + at];
      const Sum scale = scales[by_rows() ? 0 : this->place(n, 0) / H_];
      const Sum d_sum = scale * (d_pre * this->gamma(n, u) - mean.at[n] - normed * along.at[n]);
      rows_.d_gates[at] = narrow<Number>(d_sum);
      normed *= d_pre;
    }
  }

  // Past the length.
  __device__ __forceinline__ void rest(int64_t u) const {
    keep_d_c(u, 0);
    if (!rows_.d_gates) return;
    store_hidden(u, 0);
    step_.template store_cells<1>(moment_, place_of<Tile>(params_, moment_, d_, b_, u), params_.pass.hidden_map, {}, {},
                                  1);
    for (int n = 0; n < 4; ++n) {
      const int64_t at = n * H_ + u;
      rows_.d_gates[at] = narrow<Number>(Sum(0));
      static_cast<Sum*>(to_.d_pre)[of_4H_ + at] = static_cast<Sum*>(to_.normed)[of_4H_ + at] = 0;
    }
    if (to_.d_seen) static_cast<Sum*>(to_.d_seen)[of_H_ + u] = static_cast<Sum*>(to_.d_gamma_h)[of_H_ + u] = 0;
  }

  // The gradient of c before the step, for the step before it.
  __device__ __forceinline__ void keep_d_c(int64_t u, Sum d_c) const {
    *d_c_of<Tile>(params_, d_, b_, u) = d_c;
    if (params_.s > 0 || !from_.dc0) return;
    if (length_of(layer_.masks, layer_.shape.T, b_) == 0) d_c = state_at<Number>(from_.dc_n, b_, u);
    static_cast<Number*>(from_.dc0)[b_ * H_ + u] = narrow<Number>(d_c);
  }

  __device__ __forceinline__ void store_hidden(int64_t u, Sum hidden) const {
    void* const to = params_.pass.outputs[d_].hidden;
    if (to) static_cast<Number*>(to)[of_H_ + u] = narrow<Number>(hidden);
  }

  const NormBackward& params_;
  const LayerBackward& layer_;
  const BackwardDirection& from_;
  const Step step_;
  const Moment moment_;
  const BackwardReads<Tile> reads_;
  const BackwardRows<Tile> rows_;
  const NormOutputs& to_;
  const int64_t of_4H_, of_H_, of_scale_;  // where the row starts in arrays of so many numbers
};

template <class Tile>
__global__ void __launch_bounds__(kMostRowThreads) norm_backward(const __grid_constant__ NormBackward params) {
  wait_for_previous_launch();
  let_next_launch_start();
  NormBackwardRow<Tile>(params, blockIdx.y, blockIdx.x).take();
}

}  // namespace lstm_ext::cuda
