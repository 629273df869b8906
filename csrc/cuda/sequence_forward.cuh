// A whole layer forward, both directions, in one launch: each block keeps its rows of the weights on chip for all T.
//
//   pre = x W_ih' + h W_hh' + b     i, f, o = sigmoid(pre), g = tanh(pre)
//   c'  = f c + i g                 h' = o tanh(c'), with a projection W_hr times that
//
// Of a cell that normalises, between the products and the next h:
//
//   sums | moments of the row, of all ranks | gates, c | moments of c, of all ranks | c', h
//
// x W_ih' comes in as xw. A step is a product, the pointwise part of the units that this rank owns, and an exchange of
// what they made; with a projection all three happen twice.
#pragma once

#include "cell.cuh"
#include "normed.cuh"
#include "sequence.cuh"

namespace lstm_ext::cuda {

// `Params` is SequenceForward, WithCell of it, or NormSequenceForward.
template <class Tile, int kBatchTiles, Exchange kExchange, class Params>
class ForwardWalk {
  using Number = typename Tile::Number;
  using Sum = typename Tile::Sum;
  using Rows = ForwardRows<Tile>;
  using Block = SequenceBlock<Tile, kBatchTiles, Gather<Tile, kBatchTiles, kExchange>, Rows, 1>;
  static constexpr int kItem = Block::kItem;
  using Sums = Units<Sum, kItem>;
  static constexpr bool kOptions = !std::is_same_v<Params, SequenceForward>;
  static constexpr bool kNorm = std::is_same_v<Params, NormSequenceForward>;

 public:
  __device__ explicit ForwardWalk(const Params& params)
      : params_(params),
        layer_(params.layer),
        layout_(params.layout),
        to_(params.layer.direction[blockIdx.y]),
        block_(layout_, layer_.shape, layer_.masks, layer_.gates_map.packed_offset, to_.reverse, to_.weights) {
    for (int j = threadIdx.x; j < hidden().width; j += kThreads) {
      const int64_t unit = block_.team().rank() * hidden().width + j;
      const bool there = unit < hidden().limit;
      Pre<Tile>& to = reinterpret_cast<Pre<Tile>*>(bias())[j];
      if constexpr (kOptions) {
        to = there ? cell_bias_of<Tile>(to_.weights, layer_.shape.H, unit) : Pre<Tile>{};
        block_.peephole(j) = there ? cell().peephole(unit) : GateValues<Sum>{};
        if constexpr (kNorm) norm_unit(j) = there ? normed().unit(unit) : NormUnit{};
      } else {
        to = there ? bias_of<Tile>(to_.weights, layer_.shape.H, unit) : Pre<Tile>{};
      }
    }
  }

  __device__ __forceinline__ void run() { block_.for_batches(*this); }

  // By mail, others are waited for so long that nobody waits for what is stored meanwhile.
  __device__ bool may_take_turns() const { return kExchange != Exchange::kGrid && !kOptions && !block_.projected(); }

  // One batch of sequences, through all steps.
  __device__ __forceinline__ void walk() {
    block_.find_moments_from(*this, 0);
    if constexpr (kOptions) find_draw_keys_from(0);
    start();
    block_.find_copies(*this);
    block_.copy_inputs(*this, 0);
    cp_async_wait<0>();
    __syncthreads();  // they are there
    Made made;
    for (int64_t s = 0; s < layer_.shape.T; ++s) {
      if constexpr (kOptions) {
        if (block_.moments_end_at(s)) {
          block_.find_moments_from(*this, s);
          find_draw_keys_from(s);
        }
      } else {
        block_.find_moments(*this, s);
      }
      const Given given = given_to_first(s);  // while what others send is on its way, as are these copies
      block_.copy_inputs(*this, s + 1);
      // Threads that have items still store what they have made.
      const bool late = block_.count() * hidden().items.value <= kEarlyThreads;
      block_.team().receive(Product::kRecurrent, block_.count(), s > 0, late);
      block_.template multiply<Product::kRecurrent>();
      cp_async_wait<0>();
      // The sums of all warps are there, and what the next step reads; nobody reads the operand any more.
      __syncthreads();
      const bool send = s + 1 < layer_.shape.T;
      if (block_.projected()) {
        take_projected_step(s, send);
        continue;
      }
      if constexpr (kNorm) {
        take_normed_step(s, send, made);
      } else if (block_.has_turn(s)) {
        take_step(s, given, send, made);
      } else {
        store(s - 1, made);
      }
      if (send) block_.team().send(Product::kRecurrent, block_.count());
      if (!block_.takes_turns()) store(s, made);
    }
    if (block_.takes_turns() && block_.has_turn(layer_.shape.T - 1)) store(layer_.shape.T - 1, made);
  }

 private:
  // The initial state: h to the operand, c to this block's state, and both to the results of empty sequences.
  __device__ void start() {
    block_.team().fill(Product::kRecurrent, block_.count(), [&](int k, int n) {
      const int64_t p = h().index_of(k);
      Sum value =
          p < 0 || block_.moment(0, n).forgets() ? Sum(0) : state_at<Number>(to_.state.h0, block_.sequence(n), p);
      if constexpr (kOptions) {
        if (p >= 0 && cell().drops_h()) value *= cell().h_mask(place(0, n, p));
      }
      return Tile::on_chip(value);
    });
    block_.for_items(hidden(), [&](int n, int j, int64_t unit, int valid) {
      const Sums c0 = initial(to_.state.c0, n, unit, valid);
      block_.state(n, j) = block_.moment(0, n).forgets() ? Sums{} : c0;
      if (block_.is_empty(n))
        store_units(static_cast<Number*>(to_.c_n) + block_.sequence(n) * layer_.shape.H + unit, c0, valid);
    });
    block_.for_items(h(), [&](int n, int j, int64_t p, int valid) {
      if constexpr (kOptions) {
        if (cell().keeps_h())
          block_.h_state(h(), n, j) = block_.moment(0, n).forgets() ? Sums{} : initial(to_.state.h0, n, p, valid);
      }
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

  // Where a step stores.
  friend Block;
  static constexpr int kSumRows = 0;
  __device__ __forceinline__ Rows rows_of(const Moment& moment, int64_t b) const {
    return forward_rows<Tile>(layer_, to_, moment, b);
  }

  // Of xw: what this rank's units get from x, gate after gate.
  __device__ __forceinline__ RowPiece row(int n, int gate) const {
    const RowMap& map = layer_.gates_map;
    const int64_t first = int64_t{block_.team().rank()} * hidden().width;
    const Sum* from = element<Sum>(params_.xw[blockIdx.y], map, 0, block_.sequence(n), gate * layer_.shape.H + first);
    const int units = min(hidden().width, hidden().limit - static_cast<int>(first));
    return {reinterpret_cast<const char*>(from), units * int{sizeof(Sum)}};
  }
  __device__ __forceinline__ int64_t row_stride(int) const {
    return layer_.gates_map.start_stride() * int64_t{sizeof(Sum)};
  }
  static __device__ __forceinline__ bool of_step_before(int) { return false; }

  using Cells = Units<CellState<Sum>, kItem>;

  // What a thread has made of an item, and has still to store: others wait for what it sends.
  struct Made {
    int item = -1;
    StoredCells<Tile, kItem> cells;
    Units<Number, kItem> h;
  };

  // What x and the bias give the gates of an item: known before the product.
  struct Given {
    Sums gates[4];
  };

  __device__ __forceinline__ Given given(int64_t s, int n, int j) const {
    using Gates = Units<Sum, 4 * kItem>;
    const Gates b = *reinterpret_cast<const Gates*>(bias() + 4 * j);
    Given given;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) {
      given.gates[gate] = *reinterpret_cast<const Sums*>(block_.copy_of(s, n, gate) + j * int{sizeof(Sum)});
#pragma unroll
      for (int i = 0; i < kItem; ++i) given.gates[gate].at[i] += b.at[4 * i + gate];
    }
    return given;
  }

  __device__ __forceinline__ Given given_to_first(int64_t s) const {
    Given found{};
    const int item = block_.first_item(s);
    if (!kNorm && !block_.projected() && item < block_.count() * hidden().items.value)
      block_.with_item(hidden(), item, [&](int n, int j, int64_t, int) { found = given(s, n, j); });
    return found;
  }

  // Of a thread's items the last is left to be stored.
  __device__ __forceinline__ void take_step(int64_t s, Given now, bool send, Made& made) {
    made.item = -1;
    block_.for_items_from(block_.first_item(s), hidden(), [&](int item, int n, int j, int64_t unit, int valid) {
      if (made.item >= 0) {
        store(s, made);
        now = given(s, n, j);
      }
      const Moment moment = block_.moment(s, n);
      Sums h;
      const Cells cells = update(s, moment, now, n, j, unit, valid, h);
      if constexpr (kOptions) {
        h = finished_h(s, moment, n, j, unit, valid, h);
        if (send) block_.team().put(Product::kRecurrent, n, j, multiplied_h(s, moment, n, unit, h));
      } else {
        h = outputs_of(moment, cells);
        if (send) block_.team().put(Product::kRecurrent, n, j, carried_h(moment, h));
      }
      made = {item, stored_cells<Tile>(cells), narrow_units<Number>(h)};
    });
  }

  // What was made of an item of step s.
  __device__ __forceinline__ void store(int64_t s, const Made& made) const {
    if (made.item < 0) return;
    block_.with_item(hidden(), made.item, [&](int n, int, int64_t unit, int valid) {
      const Moment moment = block_.moment(s, n);
      const Rows rows = block_.rows(s, n);
      const int64_t b = block_.sequence(n);
      store_cells(layer_, to_, rows, moment, b, unit, made.cells, valid);
      store_output(layer_, to_, rows, moment, b, unit, made.h, valid);
    });
  }

  __device__ __forceinline__ void take_projected_step(int64_t s, bool send) {
    const auto project = [&](const Moment& moment, int n, int j, int64_t unit, int valid, const Cells& cells,
                             const Sums& hidden) {
      block_.team().put(Product::kProjection, n, j, hidden);
      store_cells(layer_, to_, block_.rows(s, n), moment, block_.sequence(n), unit, stored_cells<Tile>(cells), valid);
    };
    if constexpr (kNorm) {
      for_normed_items(s, [&](int, const auto&... item) { project(item...); });
    } else {
      block_.for_items(hidden(), [&](int n, int j, int64_t unit, int valid) {
        const Moment moment = block_.moment(s, n);
        Sums hidden;
        const Cells cells = update(s, moment, given(s, n, j), n, j, unit, valid, hidden);
        if constexpr (!kOptions) hidden = outputs_of(moment, cells);
        project(moment, n, j, unit, valid, cells, hidden);
      });
    }
    block_.team().send(Product::kProjection, block_.count());
    block_.team().receive(Product::kProjection, block_.count(), true, false);
    block_.template multiply<Product::kProjection>();
    __syncthreads();  // the sums of all warps are there
    block_.for_items(h(), [&](int n, int j, int64_t p, int valid) {
      const Moment moment = block_.moment(s, n);
      Sums sums = block_.team().template product<Sums>(Product::kProjection, n, j);
      if constexpr (kOptions) {
        sums = finished_h(s, moment, n, j, p, valid, sums);
        if (send) block_.team().put(Product::kRecurrent, n, j, multiplied_h(s, moment, n, p, sums));
      } else {
        if (send) block_.team().put(Product::kRecurrent, n, j, carried_h(moment, sums));
      }
      store_output(layer_, to_, block_.rows(s, n), moment, block_.sequence(n), p, narrow_units<Number>(sums), valid);
    });
    if (send) block_.team().send(Product::kRecurrent, block_.count());
  }

  // Units j and following of this rank: from the sums of their gates to their c, which the state gets as well, and of
  // cells with options to `hidden`. Units that are none are zero.
  __device__ __forceinline__ Cells update(int64_t s, const Moment& moment, const Given& given, int n, int j,
                                          int64_t unit, int valid, Sums& hidden) const {
    using Gates =
        Units<Sum, 4 * kItem>;  // i f g o of one unit after the other, as they stand in the rows of the product
    const Gates h = block_.team().template product<Gates>(Product::kRecurrent, n, 4 * j);
    const Sums c = block_.state(n, j);
    const auto pre_of = [&](int i) -> Pre<Tile> {
      Sum pre[4];
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) pre[gate] = given.gates[gate].at[i] + h.at[4 * i + gate];
      return {pre[0], pre[1], pre[2], pre[3]};
    };
    Sums after;
    Cells cells;
    if constexpr (kOptions) {
      Units<Pre<Tile>, kItem> of_item;
#pragma unroll
      for (int i = 0; i < kItem; ++i) of_item.at[i] = pre_of(i);
      cells = cell().template forward<kItem>(moment, place(s, n, unit), block_.peepholes(j), of_item, c, hidden);
    }
#pragma unroll
    for (int i = 0; i < kItem; ++i) {
      if constexpr (!kOptions) cells.at[i] = forward_cell<Tile>(moment, pre_of(i), c.at[i]);
      if (i >= valid) cells.at[i] = {};
      if (kOptions && i >= valid) hidden.at[i] = 0;
      after.at[i] = carried(moment, cells.at[i].c);
    }
    block_.state(n, j) = after;
    return cells;
  }

  // h before a projection.
  __device__ __forceinline__ Sums outputs_of(const Moment& moment, const Cells& cells) const {
    Sums h{};
#pragma unroll
    for (int i = 0; i < kItem; ++i)
      if (moment.active()) h.at[i] = cell_output<typename Tile::Math>(cells.at[i].gates.o, cells.at[i].c);
    return h;
  }

  __device__ __forceinline__ Sums carried_h(const Moment& moment, Sums h) const {
#pragma unroll
    for (int i = 0; i < kItem; ++i) h.at[i] = carried(moment, h.at[i]);
    return h;
  }

  // ---- Of cells with options ----------------------------------------------------------------------------------------

  using Step = CellStep<Tile, true>;
  __device__ __forceinline__ Step cell() const { return {params_.cell, static_cast<int>(blockIdx.y)}; }

  __device__ __forceinline__ void find_draw_keys_from(int64_t s) {
    if (!cell().draws()) return;
    block_.find_draw_keys_from(s, [&](const Moment& moment, int64_t step, int64_t b) {
      const int64_t T = layer_.shape.T;
      return cell().keys_of(moment, Step::time_of(moment, layer_.gates_map, layer_.masks, T, to_.reverse, step, b), b);
    });
  }

  __device__ __forceinline__ Place place(int64_t s, int n, int64_t unit) const {
    return {0, block_.sequence(n), unit, &block_.draw_keys(s, n)};
  }

  // h as the step leaves it, of units p and following, from what it has computed.
  __device__ __forceinline__ Sums finished_h(int64_t s, const Moment& moment, int n, int j, int64_t p, int valid,
                                             Sums values) const {
    const bool keeps = cell().keeps_h();
    const Sums before = keeps ? block_.h_state(h(), n, j) : Sums{};
#pragma unroll
    for (int i = 0; i < kItem; ++i)
      values.at[i] = moment.active() && i < valid
                         ? cell().output(place(s, n, p + i), block_.projected(), before.at[i], values.at[i])
                         : 0;
    if (keeps) block_.h_state(h(), n, j) = carried_h(moment, values);
    return values;
  }

  // What the next step multiplies.
  __device__ __forceinline__ Sums multiplied_h(int64_t s, const Moment& moment, int n, int64_t p,
                                               const Sums& values) const {
    Sums carried = carried_h(moment, values);
    if (cell().drops_h()) {
#pragma unroll
      for (int i = 0; i < kItem; ++i) carried.at[i] *= cell().h_mask(place(s, n, p + i));
    }
    return carried;
  }

  // ---- Of cells that normalise --------------------------------------------------------------------------------------

  // A warp has a sequence, and its lanes the items of it: from the sums to the moments, and from these to h, an item is
  // the same thread's.
  static_assert(!kNorm || kBatchTiles * kBatchColumns == kWarps);

  using Four = typename Normed<Tile>::Four;
  using NormUnit = typename Normed<Tile>::Unit;
  __device__ __forceinline__ Normed<Tile> normed() const {
    return {params_.norm, static_cast<int>(blockIdx.y), layer_.shape.H};
  }
  __device__ __forceinline__ NormUnit& norm_unit(int j) const { return block_.template norm_unit<NormUnit>(j); }

  __device__ __forceinline__ void take_normed_step(int64_t s, bool send, Made& made) {
    made.item = -1;
    for_normed_items(s, [&](int item, const Moment& moment, int n, int j, int64_t unit, int valid, const Cells& cells,
                            const Sums& hidden) {
      store(s, made);
      const Sums h = finished_h(s, moment, n, j, unit, valid, hidden);
      if (send) block_.team().put(Product::kRecurrent, n, j, multiplied_h(s, moment, n, unit, h));
      made = {item, stored_cells<Tile>(cells), narrow_units<Number>(h)};
    });
  }

  // Calls body(item, moment, n, j, unit, valid, cells, hidden) for this lane's items, once the state has their c.
  template <class Body>
  __device__ __forceinline__ void for_normed_items(int64_t s, const Body& body) {
    const int n = static_cast<int>(threadIdx.x) / 32;
    if (n >= block_.count()) return;
    const Normed<Tile> norm = normed();
    const Moment moment = block_.moment(s, n);
    TeamRow<Sum, typename Block::TeamOf> row(block_.team(), hidden(), n, block_.count());
    const auto for_items = [&](const auto& of_item) { block_.for_items_of(n, hidden(), of_item); };
    // What is normalised, and its moments.
    Four sums{};
    for_items([&](int, int j, int64_t, int valid) {
      using Gates = Units<Sum, 4 * kItem>;
      const Gates h = block_.team().template product<Gates>(Product::kRecurrent, n, 4 * j);
      const Given x = norm.by_rows() ? Given{} : given(s, n, j);
      Units<Four, kItem> kept;
#pragma unroll
      for (int i = 0; i < kItem; ++i) {
        kept.at[i] =
            four_of(cell().in_cells_order({h.at[4 * i] + x.gates[0].at[i], h.at[4 * i + 1] + x.gates[1].at[i],
                                           h.at[4 * i + 2] + x.gates[2].at[i], h.at[4 * i + 3] + x.gates[3].at[i]}));
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) sums.at[gate] += i < valid ? kept.at[i].at[gate] : 0;
      }
      kept_gates(n, j) = kept;
    });
    const auto means = [&](const Four& sums, Sum part) { return norm.means(sums, part); };
    const auto own_gates = row.own_part(sums, means, [&](const Four& mean) {
      Four squares{};
      for_items([&](int, int j, int64_t, int valid) {
        const Units<Four, kItem> kept = kept_gates(n, j);
#pragma unroll
        for (int i = 0; i < kItem; ++i)
#pragma unroll
          for (int gate = 0; gate < 4; ++gate)
            squares.at[gate] += i < valid ? square(kept.at[i].at[gate] - mean.at[gate]) : 0;
      });
      return squares;
    });
    const auto of_gates = row.statistics(own_gates, means);
    const auto moments = norm.moments(of_gates.mean, of_gates.variance);

    // The gates, what they make of c, and the moments of that.
    Units<Sum, 1> sum_of_c{};
    for_items([&](int, int j, int64_t unit, int valid) {
      Units<Four, kItem> kept = kept_gates(n, j);
      const Given x = norm.by_rows() ? given(s, n, j) : Given{};
      Units<Pre<Tile>, kItem> pre;
#pragma unroll
      for (int i = 0; i < kItem; ++i) {
        const NormUnit weights = norm_unit(j + i);
        const auto normed = [&](int gate) {
          return weights.scales.gamma.at[gate] * moments.at[gate].normalised(kept.at[i].at[gate]) +
                 weights.beta.at[gate];
        };
        const auto more =
            cell().in_cells_order({x.gates[0].at[i], x.gates[1].at[i], x.gates[2].at[i], x.gates[3].at[i]});
        pre.at[i] = {normed(0) + more.i, normed(1) + more.f, normed(2) + more.g, normed(3) + more.o};
      }
      const Cells made =
          cell().template made_by_gates<kItem>(place(s, n, unit), block_.peepholes(j), pre, block_.state(n, j));
      Sums c;
#pragma unroll
      for (int i = 0; i < kItem; ++i) {
        kept.at[i] = four_of(made.at[i].gates);
        c.at[i] = made.at[i].c;
        sum_of_c.at[0] += i < valid ? c.at[i] : 0;
      }
      kept_gates(n, j) = kept;
      block_.cells(n, j) = c;
    });
    const auto own_c = row.own_part(sum_of_c, MeanOfUnits(), [&](const Units<Sum, 1>& mean) {
      Units<Sum, 1> squares{};
      for_items([&](int, int j, int64_t, int valid) {
        const Sums c = block_.cells(n, j);
#pragma unroll
        for (int i = 0; i < kItem; ++i) squares.at[0] += i < valid ? square(c.at[i] - mean.at[0]) : 0;
      });
      return squares;
    });
    const auto of_c = row.statistics(own_c, MeanOfUnits());
    const Moments<Sum> moments_of_c = norm.moments(of_c.mean.at[0], of_c.variance.at[0]);

    // c as it is left, and as the output sees it.
    for_items([&](int item, int j, int64_t unit, int valid) {
      const Units<Four, kItem> kept = kept_gates(n, j);
      const Sums before = block_.state(n, j), made = block_.cells(n, j);
      Sums seen, hidden{}, after{};
      Cells cells{};
#pragma unroll
      for (int i = 0; i < kItem; ++i) seen.at[i] = norm_unit(j + i).scales.seen(moments_of_c.normalised(made.at[i]));
      const Sums activated = cell().activated(seen);
#pragma unroll
      for (int i = 0; i < kItem; ++i) {
        if (!moment.active() || i >= valid) continue;
        const GateValues<Sum> gates = gates_of(kept.at[i]);
        const Sum left = norm.by_rows() ? made.at[i] : seen.at[i];
        cells.at[i] = {gates, cell().c_left(place(s, n, unit + i), before.at[i], left)};
        hidden.at[i] = gates.o * activated.at[i];
        after.at[i] = carried(moment, cells.at[i].c);
      }
      block_.state(n, j) = after;
      body(item, moment, n, j, unit, valid, cells, hidden);
    });
  }

  static __device__ __forceinline__ Sum square(Sum value) { return value * value; }

  // The gates' sums, and then the gates, of the units of an item in the order i f g o.
  __device__ __forceinline__ Units<Four, kItem>& kept_gates(int n, int j) const {
    return block_.team().template kept<Units<Four, kItem>>(Product::kRecurrent, n, 4 * j);
  }

  __device__ __forceinline__ Sum* bias() const {
    return reinterpret_cast<Sum*>(block_.team().shared() + layout_.bias_offset);
  }

  // How the ranks divide the hidden units (of each gate), and h: the same without a projection.
  __device__ const Share& hidden() const { return layout_[Product::kRecurrent].rows; }
  __device__ const Share& h() const { return layout_[Product::kRecurrent].columns; }

  const Params& params_;
  const LayerForward& layer_;
  const Layout& layout_;
  const ForwardDirection& to_;
  Block block_;
};

template <class Tile, int kBatchTiles, Exchange kExchange>
__global__ void __launch_bounds__(kThreads, 1) sequence_forward(const __grid_constant__ SequenceForward params) {
  ForwardWalk<Tile, kBatchTiles, kExchange, SequenceForward>(params).run();
}

template <class Tile, int kBatchTiles>
__global__ void __launch_bounds__(kThreads, 1)
    norm_sequence_forward(const __grid_constant__ NormSequenceForward params) {
  ForwardWalk<Tile, kBatchTiles, Exchange::kAny, NormSequenceForward>(params).run();
}

template <class Tile, int kBatchTiles>
__global__ void __launch_bounds__(kThreads, 1)
    cell_sequence_forward(const __grid_constant__ WithCell<SequenceForward> params) {
  ForwardWalk<Tile, kBatchTiles, Exchange::kAny, WithCell<SequenceForward>>(params).run();
}

}  // namespace lstm_ext::cuda
