// A whole layer forward, both directions, in one launch: each block keeps its rows of the weights on chip for all T.
#pragma once

#include "sequence.cuh"

namespace lstm_ext::cuda {

template <class Tile, int kTiles>
class ForwardBlock : SequenceBlock<Tile, kTiles> {
  using Base = SequenceBlock<Tile, kTiles>;
  using Base::count_;
  using Base::first_;
  using Base::shape_;
  using Base::spread_;
  using Base::team_;
  using typename Base::Number;
  using typename Base::SecondWeights;
  using typename Base::Sum;

 public:
  __device__ explicit ForwardBlock(const SequenceForward& pass)
      : Base(pass.spread, pass.layer.shape, pass.layer.masks, pass.layer.direction[blockIdx.y].reverse,
             pass.layer.direction[blockIdx.y].weights.w_hh.data),
        pass_(pass),
        layer_(pass.layer),
        to_(pass.layer.direction[blockIdx.y]) {}

  __device__ void run() {
    if (spread_.num_stages == 1) {
      this->for_batch_tiles([&] { walk([&](int64_t s, bool send) { take_step(s, send); }); });
    } else {
      const SecondWeights w_hr(spread_.stage[1], to_.weights.w_hr.data, team_.rank(), team_.shared());
      this->for_batch_tiles([&] { walk([&](int64_t s, bool send) { take_projected_step(s, send, w_hr); }); });
    }
  }

 private:
  template <class Step>
  __device__ __forceinline__ void walk(const Step& step) {
    this->find_rows(0);
    __syncthreads();  // the rows are there
    start();
    for (int64_t s = 0; s < shape_.T; ++s) {
      if (s > 0) this->find_rows(s);
      this->multiply(0, this->weights_, s > 0);
      const bool send = s + 1 < shape_.T;
      step(s, send);
      if (send) team_.send(0, count_);
    }
  }

  // The initial state: h to the operand, c to this block's state, and both to the results of empty sequences.
  __device__ void start() {
    team_.fill(0, count_, [&](int k, int n) {
      const int64_t p = spread_.stage[0].columns.place(k);
      const Row& row = this->row(0, n);
      return Tile::on_chip(p < 0 || row.forgets ? Sum(0) : state_at<Number>(to_.state.h0, first_ + n, p));
    });
    this->for_units(hidden(), [&](int n, int, int64_t unit, int index) {
      const Sum c0 = state_at<Number>(to_.state.c0, first_ + n, unit);
      team_.state()[index] = this->row(0, n).forgets ? 0 : c0;
      if (this->is_empty(n)) static_cast<Number*>(to_.c_n)[(first_ + n) * shape_.H + unit] = narrow<Number>(c0);
    });
    this->for_units(spread_.stage[0].columns, [&](int n, int, int64_t p, int) {
      if (this->is_empty(n))
        static_cast<Number*>(to_.h_n)[(first_ + n) * shape_.P + p] =
            narrow<Number>(state_at<Number>(to_.state.h0, first_ + n, p));
    });
  }

  __device__ __forceinline__ void take_step(int64_t s, bool send) {
    this->for_units(hidden(), [&](int n, int j, int64_t unit, int index) {
      output(s, send, n, j, unit, update(s, n, j, unit, team_.state()[index]));
    });
  }

  __device__ __forceinline__ void take_projected_step(int64_t s, bool send, const SecondWeights& w_hr) {
    this->for_units(hidden(), [&](int n, int j, int64_t unit, int index) {
      team_.put(1, n, j, update(s, n, j, unit, team_.state()[index]));
    });
    team_.send(1, count_);
    this->multiply(1, w_hr, true);
    this->for_units(spread_.stage[1].rows,
                    [&](int n, int j, int64_t p, int) { output(s, send, n, j, p, this->product(1, n, j)); });
  }

  __device__ __forceinline__ Sum update(int64_t s, int n, int j, int64_t unit, Sum& c) const {
    const Row& row = this->row(s, n);
    Pre<Tile> pre{};
    if (row.active) {
      const auto gate = [&](int q) { return this->product(0, n, q * hidden().width + j); };
      const Pre<Tile> from_h{gate(0), gate(1), gate(2), gate(3)};
      const Pre<Tile> from_x =
          read_gates<Sum>(pass_.xw[blockIdx.y], layer_.gates_map, row.t, first_ + n, shape_.H, unit);
      pre = plus(plus(from_x, from_h), bias_of<Tile>(to_.weights, shape_.H, unit));
    }
    return forward_cell<Tile>(layer_, to_, row, first_ + n, unit, pre, c);
  }

  __device__ __forceinline__ void output(int64_t s, bool send, int n, int j, int64_t p, Sum h) {
    const Sum next = forward_output<Tile>(layer_, to_, this->row(s, n), first_ + n, p, h);
    if (send) team_.put(0, n, j, next);
  }

  // The hidden units as the ranks share them out, of each gate.
  __device__ const SharedOut& hidden() const { return spread_.stage[0].rows; }

  const SequenceForward& pass_;
  const LayerForward& layer_;
  const ForwardDirection& to_;
};

template <class Tile, int kTiles>
__global__ void __launch_bounds__(kThreads, 1) sequence_forward(const __grid_constant__ SequenceForward pass) {
  ForwardBlock<Tile, kTiles>(pass).run();
}

}  // namespace lstm_ext::cuda
