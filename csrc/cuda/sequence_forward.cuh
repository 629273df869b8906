// A whole layer forward, both directions, in one launch: each block keeps its rows of the weights on chip for all T.
//
//   pre = x W_ih' + h W_hh' + b     i, f, o = sigmoid(pre), g = tanh(pre)
//   c'  = f c + i g                 h' = o tanh(c'), with a projection W_hr times that
//
// x W_ih' comes in as xw. A step is a product, the pointwise part of the units that this rank owns, and an exchange of
// what they made; with a projection all three happen twice.
#pragma once

#include "sequence.cuh"

namespace lstm_ext::cuda {

template <class Tile, int kBatchTiles>
class ForwardWalk {
  using Number = typename Tile::Number;
  using Sum = typename Tile::Sum;
  using Block = SequenceBlock<Tile, kBatchTiles>;
  using ProjectionWeights = typename Block::ProjectionWeights;

 public:
  __device__ explicit ForwardWalk(const SequenceForward& params)
      : params_(params),
        layer_(params.layer),
        layout_(params.layout),
        to_(params.layer.direction[blockIdx.y]),
        block_(layout_, layer_.shape, layer_.masks, to_.reverse, to_.weights.w_hh.data) {}

  __device__ void run() {
    if (layout_.num_products == 1) {
      block_.for_batches([&] { walk([&](int64_t s, bool send) { take_step(s, send); }); });
    } else {
      const ProjectionWeights w_hr = block_.projection(to_.weights.w_hr.data);
      block_.for_batches([&] { walk([&](int64_t s, bool send) { take_projected_step(s, send, w_hr); }); });
    }
  }

 private:
  template <class Step>
  __device__ __forceinline__ void walk(const Step& step) {
    block_.find_moments(0);
    __syncthreads();  // the moments are there
    start();
    for (int64_t s = 0; s < layer_.shape.T; ++s) {
      if (s > 0) block_.find_moments(s);
      block_.multiply(Product::kRecurrent, block_.weights(), s > 0);
      const bool send = s + 1 < layer_.shape.T;
      step(s, send);
      if (send) block_.send(Product::kRecurrent);
    }
  }

  // The initial state: h to the operand, c to this block's state, and both to the results of empty sequences.
  __device__ void start() {
    block_.team().fill(Product::kRecurrent, block_.count(), [&](int k, int n) {
      const int64_t p = h().index_of(k);
      return Tile::on_chip(
          p < 0 || block_.moment(0, n).forgets ? Sum(0) : state_at<Number>(to_.state.h0, block_.sequence(n), p));
    });
    block_.for_units(hidden(), [&](int n, int, int64_t unit, int index) {
      const int64_t b = block_.sequence(n);
      const Sum c0 = state_at<Number>(to_.state.c0, b, unit);
      block_.state(index) = block_.moment(0, n).forgets ? 0 : c0;
      if (block_.is_empty(n)) static_cast<Number*>(to_.c_n)[b * layer_.shape.H + unit] = narrow<Number>(c0);
    });
    block_.for_units(h(), [&](int n, int, int64_t p, int) {
      const int64_t b = block_.sequence(n);
      if (block_.is_empty(n))
        static_cast<Number*>(to_.h_n)[b * layer_.shape.P + p] = narrow<Number>(state_at<Number>(to_.state.h0, b, p));
    });
  }

  __device__ __forceinline__ void take_step(int64_t s, bool send) {
    block_.for_units(hidden(), [&](int n, int j, int64_t unit, int index) {
      output(s, send, n, j, unit, update(s, n, j, unit, block_.state(index)));
    });
  }

  __device__ __forceinline__ void take_projected_step(int64_t s, bool send, const ProjectionWeights& w_hr) {
    block_.for_units(hidden(), [&](int n, int j, int64_t unit, int index) {
      block_.team().put(Product::kProjection, n, j, update(s, n, j, unit, block_.state(index)));
    });
    block_.send(Product::kProjection);
    block_.multiply(Product::kProjection, w_hr, true);
    block_.for_units(layout_[Product::kProjection].rows, [&](int n, int j, int64_t p, int) {
      output(s, send, n, j, p, block_.product(Product::kProjection, n, j));
    });
  }

  // Unit j of this rank: from the sums of its gates to its c, in place, and its h before a projection.
  __device__ __forceinline__ Sum update(int64_t s, int n, int j, int64_t unit, Sum& c) const {
    const Moment& moment = block_.moment(s, n);
    const int64_t H = layer_.shape.H;
    Pre<Tile> pre{};
    if (moment.active) {
      const auto gate = [&](int q) { return block_.product(Product::kRecurrent, n, q * hidden().width + j); };
      const Pre<Tile> from_h{gate(0), gate(1), gate(2), gate(3)};
      const Pre<Tile> from_x =
          read_gates<Sum>(params_.xw[blockIdx.y], layer_.gates_map, moment.t, block_.sequence(n), H, unit);
      pre = plus(plus(from_x, from_h), bias_of<Tile>(to_.weights, H, unit));
    }
    return forward_cell<Tile>(layer_, to_, moment, block_.sequence(n), unit, pre, c);
  }

  // Element p of h, which is number j of this rank's: to y, and to the operand of the next step.
  __device__ __forceinline__ void output(int64_t s, bool send, int n, int j, int64_t p, Sum h) {
    const Sum next = forward_output<Tile>(layer_, to_, block_.moment(s, n), block_.sequence(n), p, h);
    if (send) block_.team().put(Product::kRecurrent, n, j, next);
  }

  // How the ranks divide the hidden units (of each gate), and h: the same without a projection.
  __device__ const Slices& hidden() const { return layout_[Product::kRecurrent].rows; }
  __device__ const Slices& h() const { return layout_[Product::kRecurrent].columns; }

  const SequenceForward& params_;
  const LayerForward& layer_;
  const Layout& layout_;
  const ForwardDirection& to_;
  Block block_;
};

template <class Tile, int kBatchTiles>
__global__ void __launch_bounds__(kThreads, 1) sequence_forward(const __grid_constant__ SequenceForward params) {
  ForwardWalk<Tile, kBatchTiles>(params).run();
}

}  // namespace lstm_ext::cuda
