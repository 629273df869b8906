// A whole layer backward, both directions, in one launch: the gradients of the gates and of the initial state. Those of
// the weights and of x are products over all steps at once, and follow elsewhere.
//
//   dh      = dy + W_hh' d_gates of the step after          (with a projection W_hr' of that is the hidden units')
//   d_gates = dh, through the pointwise part (gate_math.h)  which needs the gates and c of the forward pass
//
// The walk goes from the last step to the first. What is exchanged are the d_gates, four numbers for each unit where
// the forward pass has one.
#pragma once

#include "sequence.cuh"

namespace lstm_ext::cuda {

template <class Tile, int kBatchTiles>
class BackwardWalk {
  using Number = typename Tile::Number;
  using Sum = typename Tile::Sum;
  using Block = SequenceBlock<Tile, kBatchTiles>;
  using ProjectionWeights = typename Block::ProjectionWeights;

 public:
  __device__ explicit BackwardWalk(const SequenceBackward& params)
      : pass_(params.pass),
        shape_(params.pass.layer.shape),
        layout_(params.layout),
        from_(params.pass.layer.direction[blockIdx.y]),
        block_(layout_, shape_, pass_.layer.masks, from_.reverse, from_.weights.w_hh.data) {}

  __device__ void run() {
    if (layout_.num_products == 1) {
      block_.for_batches([&] { walk([&](int64_t s) { take_step(s); }); });
    } else {
      const ProjectionWeights w_hr = block_.projection(from_.weights.w_hr.data);
      block_.for_batches([&] { walk([&](int64_t s) { take_projected_step(s, w_hr); }); });
    }
  }

 private:
  template <class Step>
  __device__ __forceinline__ void walk(const Step& step) {
    block_.team().fill(Product::kRecurrent, 0, [](int, int) { return Tile::on_chip(0); });
    block_.for_units(hidden(), [&](int, int, int64_t, int index) { block_.state(index) = 0; });
    for (int64_t s = shape_.T - 1; s >= 0; --s) {
      block_.find_moments(s);
      block_.multiply(Product::kRecurrent, block_.weights(), s + 1 < shape_.T);
      step(s);
      block_.send(Product::kRecurrent);
    }
    finish();
  }

  __device__ __forceinline__ void take_step(int64_t s) {
    block_.for_units(hidden(), [&](int n, int j, int64_t unit, int index) {
      update(s, n, j, unit, output(s, n, j, unit), block_.state(index));
    });
  }

  __device__ __forceinline__ void take_projected_step(int64_t s, const ProjectionWeights& w_hr) {
    block_.for_units(
        h(), [&](int n, int j, int64_t p, int) { block_.team().put(Product::kProjection, n, j, output(s, n, j, p)); });
    block_.send(Product::kProjection);
    block_.multiply(Product::kProjection, w_hr, true);
    block_.for_units(hidden(), [&](int n, int j, int64_t unit, int index) {
      update(s, n, j, unit, block_.product(Product::kProjection, n, j), block_.state(index));
    });
  }

  // The gradient of element p of h, which is number j of this rank's.
  __device__ __forceinline__ Sum output(int64_t s, int n, int j, int64_t p) const {
    const Sum d_h = block_.product(Product::kRecurrent, n, j);
    return backward_output<Tile>(pass_, blockIdx.y, block_.moment(s, n), s, block_.sequence(n), p, d_h);
  }

  // Unit j of this rank: from the gradient of its h to those of its gates, for the operand of the step before, and of
  // its c, in place.
  __device__ __forceinline__ void update(int64_t s, int n, int j, int64_t unit, Sum d_h, Sum& d_c) {
    const Pre<Tile> sent =
        backward_cell<Tile>(pass_, blockIdx.y, block_.moment(s, n), s, block_.sequence(n), unit, d_h, d_c);
    const int width = hidden().width;
    block_.team().put(Product::kRecurrent, n, j, sent.i);
    block_.team().put(Product::kRecurrent, n, width + j, sent.f);
    block_.team().put(Product::kRecurrent, n, 2 * width + j, sent.g);
    block_.team().put(Product::kRecurrent, n, 3 * width + j, sent.o);
  }

  // The gradients of the initial state. An empty sequence has it as its final state.
  __device__ void finish() {
    block_.multiply(Product::kRecurrent, block_.weights(), true);
    if (from_.dh0) {
      block_.for_units(h(), [&](int n, int j, int64_t p, int) {
        const int64_t b = block_.sequence(n);
        const bool empty = block_.is_empty(n);
        const Sum d_h = empty ? state_at<Number>(from_.dh_n, b, p) : block_.product(Product::kRecurrent, n, j);
        static_cast<Number*>(from_.dh0)[b * shape_.P + p] = narrow<Number>(d_h);
      });
    }
    if (!from_.dc0) return;
    block_.for_units(hidden(), [&](int n, int, int64_t unit, int index) {
      const int64_t b = block_.sequence(n);
      const Sum d_c = block_.is_empty(n) ? state_at<Number>(from_.dc_n, b, unit) : block_.state(index);
      static_cast<Number*>(from_.dc0)[b * shape_.H + unit] = narrow<Number>(d_c);
    });
  }

  // How the ranks divide the hidden units, and h: the same without a projection. The columns of the recurrent product
  // are the four gates of each unit.
  __device__ const Slices& hidden() const { return layout_.product[layout_.num_products - 1].rows; }
  __device__ const Slices& h() const { return layout_[Product::kRecurrent].rows; }

  const BackwardPass& pass_;
  const SequenceShape& shape_;
  const Layout& layout_;
  const BackwardDirection& from_;
  Block block_;
};

template <class Tile, int kBatchTiles>
__global__ void __launch_bounds__(kThreads, 1) sequence_backward(const __grid_constant__ SequenceBackward params) {
  BackwardWalk<Tile, kBatchTiles>(params).run();
}

}  // namespace lstm_ext::cuda
