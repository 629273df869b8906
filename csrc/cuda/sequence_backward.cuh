// A whole layer backward, both directions, in one launch: the gradients of the gates and of the initial state. Those of
// the weights and of x are products over all steps at once, and follow elsewhere.
#pragma once

#include "sequence.cuh"

namespace lstm_ext::cuda {

template <class Tile, int kTiles>
class BackwardBlock : SequenceBlock<Tile, kTiles> {
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
  __device__ BackwardBlock(const BackwardPass& pass, const Spread& spread)
      : Base(spread, pass.layer.shape, pass.layer.masks, pass.layer.direction[blockIdx.y].reverse,
             pass.layer.direction[blockIdx.y].weights.w_hh.data),
        pass_(pass),
        from_(pass.layer.direction[blockIdx.y]) {}

  __device__ void run() {
    if (spread_.num_stages == 1) {
      this->for_batch_tiles([&] { walk([&](int64_t s) { take_step(s); }); });
    } else {
      const SecondWeights w_hr(spread_.stage[1], from_.weights.w_hr.data, team_.rank(), team_.shared());
      this->for_batch_tiles([&] { walk([&](int64_t s) { take_projected_step(s, w_hr); }); });
    }
  }

 private:
  // Stage 0 turns the gates' gradients of step s + 1 into that of h after step s.
  template <class Step>
  __device__ __forceinline__ void walk(const Step& step) {
    team_.fill(0, 0, [](int, int) { return Tile::on_chip(0); });
    this->for_units(units(), [&](int, int, int64_t, int index) { team_.state()[index] = 0; });
    for (int64_t s = shape_.T - 1; s >= 0; --s) {
      this->find_rows(s);
      this->multiply(0, this->weights_, s + 1 < shape_.T);
      step(s);
      team_.send(0, count_);
    }
    finish();
  }

  __device__ __forceinline__ void take_step(int64_t s) {
    this->for_units(units(), [&](int n, int j, int64_t unit, int index) {
      update(s, n, j, unit, output(s, n, j, unit), team_.state()[index]);
    });
  }

  __device__ __forceinline__ void take_projected_step(int64_t s, const SecondWeights& w_hr) {
    this->for_units(spread_.stage[0].rows,
                    [&](int n, int j, int64_t p, int) { team_.put(1, n, j, output(s, n, j, p)); });
    team_.send(1, count_);
    this->multiply(1, w_hr, true);
    this->for_units(units(), [&](int n, int j, int64_t unit, int index) {
      update(s, n, j, unit, this->product(1, n, j), team_.state()[index]);
    });
  }

  __device__ __forceinline__ Sum output(int64_t s, int n, int j, int64_t p) const {
    const Sum d_h = this->product(0, n, j);
    return backward_output<Tile>(pass_, blockIdx.y, this->row(s, n), s, first_ + n, p, d_h);
  }

  __device__ __forceinline__ void update(int64_t s, int n, int j, int64_t unit, Sum d_h, Sum& d_c) {
    const Pre<Tile> sent = backward_cell<Tile>(pass_, blockIdx.y, this->row(s, n), s, first_ + n, unit, d_h, d_c);
    const int width = units().width;
    team_.put(0, n, j, sent.i);
    team_.put(0, n, width + j, sent.f);
    team_.put(0, n, 2 * width + j, sent.g);
    team_.put(0, n, 3 * width + j, sent.o);
  }

  // The gradients of the initial state. An empty sequence has it as its final state.
  __device__ void finish() {
    this->multiply(0, this->weights_, true);
    if (from_.dh0) {
      this->for_units(spread_.stage[0].rows, [&](int n, int j, int64_t p, int) {
        const Sum d_h = this->is_empty(n) ? state_at<Number>(from_.dh_n, first_ + n, p) : this->product(0, n, j);
        static_cast<Number*>(from_.dh0)[(first_ + n) * shape_.P + p] = narrow<Number>(d_h);
      });
    }
    if (!from_.dc0) return;
    this->for_units(units(), [&](int n, int, int64_t unit, int index) {
      const Sum d_c = this->is_empty(n) ? state_at<Number>(from_.dc_n, first_ + n, unit) : team_.state()[index];
      static_cast<Number*>(from_.dc0)[(first_ + n) * shape_.H + unit] = narrow<Number>(d_c);
    });
  }

  // The hidden units as the ranks share them out; the columns of stage 0 are the four gates of each.
  __device__ const SharedOut& units() const { return spread_.stage[spread_.num_stages - 1].rows; }

  const BackwardPass& pass_;
  const BackwardDirection& from_;
};

template <class Tile, int kTiles>
__global__ void __launch_bounds__(kThreads, 1) sequence_backward(const __grid_constant__ SequenceBackward params) {
  BackwardBlock<Tile, kTiles>(params.pass, params.spread).run();
}

}  // namespace lstm_ext::cuda
