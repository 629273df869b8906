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

template <class Tile, bool kOne>
class NormBackwardRow : NormRow<Tile, kOne> {
  using Base = NormRow<Tile, kOne>;
  using Base::b_, Base::by_rows, Base::d_, Base::H_, Base::row_;
  using typename Base::Number, typename Base::Sum, typename Base::Four, typename Base::Scales;
  using Step = CellStep<Tile, false>;

 public:
  // Reads nothing that a launch of this layer writes.
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
        of_scale_(params.scales_map.from_start(moment_.start, b)) {
    if constexpr (kOne) this->for_units([&](int64_t u) { weights_ = load_weights(u); });
  }

  __device__ __forceinline__ void take() {
    if constexpr (kOne)
      if (moment_.active()) this->for_units([&](int64_t u) { read_ = load(u); });
    this->make_units([&](int64_t u) { return first_known(u); });
    if (!moment_.active()) return this->for_units([&](int64_t u) { rest(u); });
    const Moments<Sum> of_c = this->template moments_of<kC>();
    const Units<Sum, 2> of_seen = this->template total<2>([&](int64_t u, Four& unit) { return see(u, of_c, unit); });
    const auto of_gates =
        this->template total<8>([&](int64_t u, const Four& unit) { return differentiate(u, of_c, of_seen, unit); });
    const Sum part = 1 / static_cast<Sum>(H_);
    const Four d = this->means({of_gates.at[0], of_gates.at[1], of_gates.at[2], of_gates.at[3]}, part);
    const Four along = this->means({of_gates.at[4], of_gates.at[5], of_gates.at[6], of_gates.at[7]}, part);
    this->for_units([&](int64_t u) { finish(u, d, along); });
  }

 private:
  // What a unit remembers: the gradient of its h, c as the gates made it, the gradient of the normalised c, and what o
  // is multiplied by.
  enum Known : int { kDH, kC, kDNormedC, kOut };

  // Of a unit: what is the same at all steps, and what is read at this one. With kOne a thread reads both only once:
  // the former before the launch before has ended, the latter before the block's first barrier.
  struct Weights {
    Scales scales;
    GateValues<Sum> peephole;
  };
  __device__ __forceinline__ Weights load_weights(int64_t u) const { return {this->scales(u), step_.peephole(u)}; }
  struct Read {
    Place at;
    BackwardInputs<Sum> inputs;  // what the forward pass left
    Sum d_c, g_mask, raw_c;
    Four normed;
  };
  __device__ __forceinline__ Read load(int64_t u) const {
    const auto loaded =
        load_cell_backward<Tile, 1>(params_, reads_, moment_, d_, b_, u, 1, d_c_of<Tile>(params_, d_, b_, u));
    const BackwardInputs<Sum> inputs = loaded.inputs(0);
    const Place at = place_of<Tile>(params_, moment_, d_, b_, u);
    const Sum d_c = moment_.last() ? state_at<Number>(from_.dc_n, b_, u) : loaded.d_c.at[0];
    const Sum mask = step_.g_mask(at);
    return {at,
            inputs,
            d_c + inputs.d_cells,
            mask,
            step_.c_before_clip(inputs, mask, !by_rows()),
            this->gates_at(static_cast<const Sum*>(to_.normed) + of_4H_, u)};
  }
  __device__ __forceinline__ Weights weights(int64_t u) const {
    return this->kept_or(weights_, [&] { return load_weights(u); });
  }
  __device__ __forceinline__ Read read(int64_t u) const {
    return this->kept_or(read_, [&] { return load(u); });
  }

  __device__ __forceinline__ Four first_known(int64_t u) const {
    Four unit{};
    unit.at[kDH] = layer_.shape.projected ? row_[u] : d_h_from(u, row_[u]);
    if (moment_.active()) unit.at[kC] = step_.c_clipped(read(u).raw_c);
    return unit;
  }

  // From what the product has left.
  __device__ __forceinline__ Sum d_h_from(int64_t u, Sum product) const {
    Number dy = narrow<Number>(Sum(0));
    if (reads_.dy) dy = reads_.dy[u];
    const Sum from_next_step = d_h_of_cell<Tile>(params_, d_, b_, u, product);
    const Sum of_h = backward_output<Number>(from_, moment_, b_, u, from_next_step, widen(dy));
    return cell_output_backward<Tile>(params_, rows_, moment_, d_, b_, u, of_h);
  }

  // The gradient of c as the output sees it; what goes into that of the normalised c.
  __device__ __forceinline__ Units<Sum, 2> see(int64_t u, const Moments<Sum>& of_c, Four& unit) const {
    const Read read = this->read(u);
    const Scales scales = weights(u).scales;
    const Sum normed = of_c.normalised(unit.at[kC]);
    unit.at[kOut] = step_.activated(scales.seen(normed));
    Sum d_seen = unit.at[kDH] * read.inputs.gates.o * step_.d_activated(unit.at[kOut]);
    if (!by_rows()) d_seen += step_.c_backward(read.at, read.d_c).made;
    if (to_.d_seen) {
      static_cast<Sum*>(to_.d_seen)[of_H_ + u] = d_seen;
      static_cast<Sum*>(to_.d_gamma_h)[of_H_ + u] = d_seen * normed;
    }
    unit.at[kDNormedC] = d_seen * scales.gamma_h;
    return {{unit.at[kDNormedC], unit.at[kDNormedC] * normed}};
  }

  // The gradients of the gates before their activation, and of c before the step; what goes into those of the sums.
  __device__ __forceinline__ Units<Sum, 8> differentiate(int64_t u, const Moments<Sum>& of_c,
                                                         const Units<Sum, 2>& of_seen, const Four& unit) {
    const Read read = this->read(u);
    const Weights weights = this->weights(u);
    const Sum H = static_cast<Sum>(H_), normed_c = of_c.normalised(unit.at[kC]);
    const Sum d_c = of_c.scale * (unit.at[kDNormedC] - of_seen.at[0] / H - normed_c * (of_seen.at[1] / H));
    typename Step::CGrad grad = step_.c_backward(read.at, read.d_c);
    grad.made = by_rows() ? grad.made + d_c : d_c;
    const BackwardCell<Sum> cell = step_.template gates_backward<false>(
        weights.peephole, read.inputs, {read.g_mask, read.raw_c, unit.at[kOut]}, unit.at[kDH], grad);
    keep_d_c(u, moment_.forgets() ? 0 : cell.grad.d_c_prev);
    store_hidden(u, cell.hidden);
    step_.template store_cells<1>(moment_, read.at, params_.pass.hidden_map, {{read.inputs.c_prev}}, {{unit.at[kC]}},
                                  1);
    const Four d_pre{cell.grad.d_pre.i, cell.grad.d_pre.f, cell.grad.d_pre.g, cell.grad.d_pre.o};
    Units<Sum, 8> sums;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      static_cast<Sum*>(to_.d_pre)[of_4H_ + this->place(n, u)] = d_pre.at[n];
      sums.at[n] = d_pre.at[n] * weights.scales.gamma.at[n];
      sums.at[4 + n] = sums.at[n] * read.normed.at[n];
    }
    if constexpr (kOne) d_pre_ = d_pre;
    return sums;
  }
  __device__ __forceinline__ Four d_pre(int64_t u) const {
    return this->kept_or(d_pre_, [&] { return this->gates_at(static_cast<const Sum*>(to_.d_pre) + of_4H_, u); });
  }

  // Of the sums: by the means of their gradients, and of those times what they were normalised to.
  __device__ __forceinline__ void finish(int64_t u, const Four& mean, const Four& along) const {
    const Sum* scales = static_cast<const Sum*>(to_.scales) + of_scale_;
    const Four normed = read(u).normed, d_pre = this->d_pre(u), gamma = weights(u).scales.gamma;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int64_t at = this->place(n, u);
      const Sum scale = scales[by_rows() ? 0 : this->place(n, 0) / H_];
      const Sum d_sum = scale * (d_pre.at[n] * gamma.at[n] - mean.at[n] - normed.at[n] * along.at[n]);
      rows_.d_gates[at] = narrow<Number>(d_sum);
      static_cast<Sum*>(to_.normed)[of_4H_ + at] = normed.at[n] * d_pre.at[n];
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
  Weights weights_;                        // kOne: these three are of the thread's unit
  Read read_;
  Four d_pre_;
};

template <class Tile>
__global__ void __launch_bounds__(most_row_threads(sizeof(typename Tile::Sum)), 1)
    norm_backward(const __grid_constant__ NormBackward params) {
  take_row<NormBackwardRow, Tile>(params, params.pass.layer.shape.H);
}

}  // namespace lstm_ext::cuda
