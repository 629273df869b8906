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

template <class Tile, int kBatchTiles, Exchange kExchange>
class ForwardWalk {
  using Number = typename Tile::Number;
  using Sum = typename Tile::Sum;
  using Block = SequenceBlock<Tile, kBatchTiles, Gather<Tile, kBatchTiles, kExchange>, 1>;
  static constexpr int kItem = Block::kItem;
  using Sums = Units<Sum, kItem>;

 public:
  __device__ explicit ForwardWalk(const SequenceForward& params)
      : params_(params),
        layer_(params.layer),
        layout_(params.layout),
        to_(params.layer.direction[blockIdx.y]),
        block_(layout_, layer_.shape, layer_.masks, layer_.gates_map.packed_offset, to_.reverse, to_.weights) {
    for (int j = threadIdx.x; j < hidden().width; j += kThreads) {
      const int64_t unit = block_.team().rank() * hidden().width + j;
      reinterpret_cast<Pre<Tile>*>(bias())[j] =
          unit < hidden().limit ? bias_of<Tile>(to_.weights, layer_.shape.H, unit) : Pre<Tile>{};
    }
  }

  __device__ void run() {
    block_.for_batches([&] { walk(); });
  }

 private:
  __device__ __forceinline__ void walk() {
    block_.find_moments_from(0);
    start();
    copy_inputs(0);
    for (int64_t s = 0; s < layer_.shape.T; ++s) {
      block_.find_moments(s);
      if constexpr (!Block::kAlone) copy_inputs(s + 1);  // while what others send is on its way
      block_.team().receive(Product::kRecurrent, block_.count(), s > 0);
      if constexpr (Block::kAlone) copy_inputs(s + 1);
      block_.template multiply<Product::kRecurrent>();
      cp_async_wait<1>();  // those of this step; the next one's are under way
      __syncthreads();     // they are there, and the sums of all warps; nobody reads the operand any more
      const bool send = s + 1 < layer_.shape.T;
      if (block_.projected()) {
        take_projected_step(s, send);
      } else {
        take_step(s, send);
      }
    }
    cp_async_wait<0>();
  }

  // The initial state: h to the operand, c to this block's state, and both to the results of empty sequences.
  __device__ void start() {
    block_.team().fill(Product::kRecurrent, block_.count(), [&](int k, int n) {
      const int64_t p = h().index_of(k);
      return Tile::on_chip(
          p < 0 || block_.moment(0, n).forgets ? Sum(0) : state_at<Number>(to_.state.h0, block_.sequence(n), p));
    });
    block_.for_items(hidden(), [&](int n, int j, int64_t unit, int valid) {
      const Sums c0 = initial(to_.state.c0, n, unit, valid);
      block_.state(n, j) = block_.moment(0, n).forgets ? Sums{} : c0;
      if (block_.is_empty(n))
        store_units(static_cast<Number*>(to_.c_n) + block_.sequence(n) * layer_.shape.H + unit, c0, valid);
    });
    block_.for_items(h(), [&](int n, int, int64_t p, int valid) {
      if (block_.is_empty(n))
        store_units(static_cast<Number*>(to_.h_n) + block_.sequence(n) * layer_.shape.P + p,
                    initial(to_.state.h0, n, p, valid), valid);
    });
  }

  __device__ Sums initial(const Matrix& state, int n, int64_t unit, int valid) const {
    Sums values;
#pragma unroll
    for (int i = 0; i < kItem; ++i)
      values.at[i] = i < valid ? state_at<Number>(state, block_.sequence(n), unit + i) : 0;
    return values;
  }

  // The rows of xw that step s will read, if there is such a step; always one group of copies.
  __device__ __forceinline__ void copy_inputs(int64_t s) const {
    if (s < layer_.shape.T) {
      const int64_t first = int64_t{block_.team().rank()} * hidden().width;
      const int bytes = min(hidden().width, hidden().limit - static_cast<int>(first)) * int{sizeof(Sum)};
      for (int row = threadIdx.x / 32; row < 4 * block_.count(); row += kWarps) {
        const int n = row / 4, gate = row % 4;
        const Moment& moment = block_.moment(s, n);
        if (!moment.active) continue;
        const Sum* from = element<Sum>(params_.xw[blockIdx.y], layer_.gates_map, moment.start, block_.sequence(n),
                                       gate * layer_.shape.H + first);
        copy_row(block_.copy_of(s, n, gate), from, bytes);
      }
    }
    cp_async_commit();
  }

  using Cells = Units<CellState<Sum>, kItem>;

  // What a thread has made of an item, and has still to store.
  struct Made {
    int n, valid = 0;
    int64_t unit;
    Cells cells;
    Sums h;
  };

  // Each thread's last item is stored after it is sent: others wait for it.
  __device__ __forceinline__ void take_step(int64_t s, bool send) {
    Made made;
    block_.for_items(hidden(), [&](int n, int j, int64_t unit, int valid) {
      store(s, made);
      const Moment& moment = block_.moment(s, n);
      made = {n, valid, unit, update(s, moment, n, j, valid), {}};
      made.h = outputs_of(moment, made.cells);
      if (send) block_.team().put(Product::kRecurrent, n, j, carried_h(moment, made.h));
    });
    if (send) block_.team().send(Product::kRecurrent, block_.count());
    store(s, made);
  }

  __device__ __forceinline__ void store(int64_t s, const Made& made) const {
    if (made.valid <= 0) return;
    const Moment& moment = block_.moment(s, made.n);
    store_cells<Tile>(layer_, to_, moment, block_.sequence(made.n), made.unit, made.cells, made.valid);
    store_output<Tile>(layer_, to_, moment, block_.sequence(made.n), made.unit, made.h, made.valid);
  }

  __device__ __forceinline__ void take_projected_step(int64_t s, bool send) {
    block_.for_items(hidden(), [&](int n, int j, int64_t unit, int valid) {
      const Moment& moment = block_.moment(s, n);
      const Cells cells = update(s, moment, n, j, valid);
      block_.team().put(Product::kProjection, n, j, outputs_of(moment, cells));
      store_cells<Tile>(layer_, to_, moment, block_.sequence(n), unit, cells, valid);
    });
    block_.team().send(Product::kProjection, block_.count());
    block_.team().receive(Product::kProjection, block_.count(), true);
    block_.template multiply<Product::kProjection>();
    __syncthreads();  // the sums of all warps are there
    block_.for_items(h(), [&](int n, int j, int64_t p, int valid) {
      const Moment& moment = block_.moment(s, n);
      const Sums sums = block_.team().template product<Sums>(Product::kProjection, n, j);
      if (send) block_.team().put(Product::kRecurrent, n, j, carried_h(moment, sums));
      store_output<Tile>(layer_, to_, moment, block_.sequence(n), p, sums, valid);
    });
    if (send) block_.team().send(Product::kRecurrent, block_.count());
  }

  // Units j and following of this rank: from the sums of their gates to their c, which the state gets as well. Units
  // that are none are zero.
  __device__ __forceinline__ Cells update(int64_t s, const Moment& moment, int n, int j, int valid) const {
    Sums from_x[4];
#pragma unroll
    for (int gate = 0; gate < 4; ++gate)
      from_x[gate] = *reinterpret_cast<const Sums*>(block_.copy_of(s, n, gate) + j * int{sizeof(Sum)});
    using Gates =
        Units<Sum, 4 * kItem>;  // i f g o of one unit after the other, as they stand in the rows of the product
    const Gates h = block_.team().template product<Gates>(Product::kRecurrent, n, 4 * j);
    const Gates b = *reinterpret_cast<const Gates*>(bias() + 4 * j);
    Sums& c = block_.state(n, j);
    const Sums before = c;
    Sums after;
    Cells cells;
#pragma unroll
    for (int i = 0; i < kItem; ++i) {
      Sum pre[4];
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) pre[gate] = from_x[gate].at[i] + h.at[4 * i + gate] + b.at[4 * i + gate];
      cells.at[i] = forward_cell<Tile>(moment, {pre[0], pre[1], pre[2], pre[3]}, before.at[i]);
      if (i >= valid) cells.at[i] = {};
      after.at[i] = carried(moment, cells.at[i].c);
    }
    c = after;
    return cells;
  }

  // h before a projection.
  __device__ __forceinline__ Sums outputs_of(const Moment& moment, const Cells& cells) const {
    Sums h{};
#pragma unroll
    for (int i = 0; i < kItem; ++i)
      if (moment.active) h.at[i] = cell_output<typename Tile::Math>(cells.at[i].gates.o, cells.at[i].c);
    return h;
  }

  __device__ __forceinline__ Sums carried_h(const Moment& moment, Sums h) const {
#pragma unroll
    for (int i = 0; i < kItem; ++i) h.at[i] = carried(moment, h.at[i]);
    return h;
  }

  __device__ __forceinline__ Sum* bias() const {
    return reinterpret_cast<Sum*>(block_.team().shared() + layout_.bias_offset);
  }

  // How the ranks divide the hidden units (of each gate), and h: the same without a projection.
  __device__ const Share& hidden() const { return layout_[Product::kRecurrent].rows; }
  __device__ const Share& h() const { return layout_[Product::kRecurrent].columns; }

  const SequenceForward& params_;
  const LayerForward& layer_;
  const Layout& layout_;
  const ForwardDirection& to_;
  Block block_;
};

template <class Tile, int kBatchTiles, Exchange kExchange>
__global__ void __launch_bounds__(kThreads, 1) sequence_forward(const __grid_constant__ SequenceForward params) {
  ForwardWalk<Tile, kBatchTiles, kExchange>(params).run();
}

}  // namespace lstm_ext::cuda
