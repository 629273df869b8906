// A whole layer backward, both directions, in one launch: the gradients of the gates and of the initial state. Those of
// the weights and of x are products over all steps at once, and follow elsewhere.
//
//   dh      = dy + W_hh' d_gates of the step after          (with a projection W_hr' of that is the hidden units')
//   d_gates = dh, through the pointwise part (gate_math.h)  which needs the gates and c of the forward pass
//
// Of a cell that normalises, between dh and the product:
//
//   c | its moments, of all ranks | dc, and dh through o | two sums of the row | d_gates | two sums for each gate |
//   those of the sums
//
// The walk goes from the last step to the first. A rank multiplies the d_gates of its own units, and sends each rank
// its part of dh: one number for each unit, where to gather the d_gates would take four.
#pragma once

#include "cell.cuh"
#include "normed.cuh"
#include "sequence.cuh"

namespace lstm_ext::cuda {

// `Params` is SequenceBackward, WithCell of it, or NormSequenceBackward.
template <class Tile, int kBatchTiles, Exchange kExchange, class Params>
class BackwardWalk {
  using Number = typename Tile::Number;
  using Sum = typename Tile::Sum;
  using Rows = BackwardRows<Tile>;
  using Block = SequenceBlock<Tile, kBatchTiles, Scatter<Tile, kBatchTiles, kExchange>, Rows, -1>;
  static constexpr int kItem = Block::kItem;
  using Sums = Units<Sum, kItem>;
  using Cells = Units<BackwardCell<Sum>, kItem>;
  static constexpr bool kOptions = !std::is_same_v<Params, SequenceBackward>;
  static constexpr bool kNorm = std::is_same_v<Params, NormSequenceBackward>;

 public:
  __device__ explicit BackwardWalk(const Params& params)
      : params_(params),
        pass_(params.pass),
        shape_(params.pass.layer.shape),
        layout_(params.layout),
        from_(params.pass.layer.direction[blockIdx.y]),
        block_(layout_, shape_, pass_.layer.masks, pass_.layer.gates_map.packed_offset, from_.reverse, from_.weights) {
    if constexpr (kOptions) {
      for (int j = threadIdx.x; j < hidden().width; j += kThreads) {
        const int64_t unit = first(hidden()) + j;
        block_.peephole(j) = unit < hidden().limit ? cell().peephole(unit) : GateValues<Sum>{};
        if constexpr (kNorm) norm_unit(j) = unit < hidden().limit ? normed().unit(unit) : NormUnit{};
      }
    }
  }

  __device__ __forceinline__ void run() { block_.for_batches(*this); }

  // By mail, others are waited for so long that nobody waits for what is stored meanwhile.
  __device__ bool may_take_turns() const { return kExchange != Exchange::kGrid && !kOptions && !block_.projected(); }

  // One batch of sequences, through all steps.
  __device__ __forceinline__ void walk() {
    const int64_t last = shape_.T - 1;
    block_.find_moments_from(*this, last);
    if constexpr (kOptions) find_draw_keys_from(last);
    start(last);
    block_.find_copies(*this);
    block_.copy_inputs(*this, last);
    cp_async_wait<0>();
    __syncthreads();  // they are there
    Made made;
    for (int64_t s = last; s >= 0; --s) {
      if constexpr (kOptions) {
        if (block_.moments_end_at(s)) {
          block_.find_moments_from(*this, s);
          find_draw_keys_from(s);
        }
      } else {
        block_.find_moments(*this, s);
      }
      const Given given = given_to_first(s);  // while what others send is on its way, as are these copies
      block_.copy_inputs(*this, s - 1);
      if constexpr (kNorm) find_c(s);
      if (s < last) block_.team().receive(Product::kRecurrent, block_.count());
      if (block_.projected()) {
        take_projected_step(s, made);
      } else if constexpr (kNorm) {
        take_normed_step(s, made);
      } else if (block_.has_turn(s)) {
        take_step(s, given, made);
      } else {
        store(s + 1, made);
      }
      __syncthreads();  // the operand is there, and nobody reads the sums of the step after
      block_.template multiply<Product::kRecurrent>();
      cp_async_wait<0>();
      __syncthreads();  // the sums of all warps are there, and what the next step reads
      block_.team().send(Product::kRecurrent, block_.count());
      if (!block_.takes_turns()) store(s, made);
    }
    if (block_.takes_turns() && block_.has_turn(0)) store(0, made);
    block_.team().receive(Product::kRecurrent, block_.count());
    finish();
  }

 private:
  // No gradient of c comes from behind the last step, whose c is read here and of which each step leaves the one
  // before.
  __device__ void start(int64_t last) {
    block_.for_items(hidden(), [&](int n, int j, int64_t unit, int valid) {
      const Moment& moment = block_.moment(last, n);
      Sums c{};
#pragma unroll
      for (int i = 0; i < kItem; ++i)
        if (moment.active() && i < valid)
          c.at[i] = *element<Sum>(from_.cells, pass_.layer.cells_map, moment.start, block_.sequence(n), unit + i);
      block_.cells(n, j) = c;
      block_.state(n, j) = {};
    });
    if constexpr (kOptions) {
      if (cell().keeps_h()) block_.for_items(h(), [&](int n, int j, int64_t, int) { block_.h_state(h(), n, j) = {}; });
    }
  }

  // ---- What a step reads --------------------------------------------------------------------------------------------

  static constexpr int kCells = 4, kCellGrads = 5, kNormedGates = 6, kSumRows = kNorm ? kNormCellRows : kCellRows,
                       kOutputGrads = 4 + kSumRows;

  friend Block;
  __device__ __forceinline__ Rows rows_of(const Moment& moment, int64_t b) const {
    return backward_rows<Tile, kOptions>(pass_, blockIdx.y, moment, b);
  }

  // From this rank's first unit on: the gates and d_cells of the step, dy, and the cells of the step before.
  __device__ __forceinline__ RowPiece row(int n, int row) const {
    const auto from = [](const auto* first, int units) -> RowPiece {
      return {reinterpret_cast<const char*>(first), units * int{sizeof(*first)}};
    };
    const LayerBackward& layer = pass_.layer;
    if (row < kCells) return from(gate_row(0, n, row), there(hidden()));
    if (row == kCells) return from(cell_row(from_.cells, layer.cells_map, n), there(hidden()));
    if (row == kCellGrads && from_.d_cells) return from(cell_row(from_.d_cells, layer.d_cells_map, n), there(hidden()));
    if (row == kOutputGrads && from_.dy) return from(dy_row(0, n), there(h()));
    if constexpr (kNorm) {
      if (row != kOutputGrads && row >= kNormedGates)
        return from(normed_row(0, n, row - kNormedGates), there(hidden()));
    }
    return {};
  }
  __device__ __forceinline__ int64_t row_stride(int row) const {
    const LayerBackward& layer = pass_.layer;
    if (row < kCells) return layer.gates_map.start_stride() * int64_t{sizeof(Number)};
    if (row == kOutputGrads) return layer.dy_map.start_stride() * int64_t{sizeof(Number)};
    if (kNorm && row >= kNormedGates) return pass_.d_gates_map.start_stride() * int64_t{sizeof(Sum)};
    return (row == kCells ? layer.cells_map : layer.d_cells_map).start_stride() * int64_t{sizeof(Sum)};
  }
  static __device__ __forceinline__ bool of_step_before(int row) { return row == kCells; }
  __device__ __forceinline__ const Number* gate_row(int64_t start, int n, int gate) const {
    return element<Number>(from_.gates, pass_.layer.gates_map, start, block_.sequence(n),
                           gate * shape_.H + first(hidden()));
  }
  __device__ __forceinline__ const Number* dy_row(int64_t start, int n) const {
    return element<Number>(from_.dy, pass_.layer.dy_map, start, block_.sequence(n), first(h()));
  }
  __device__ __forceinline__ const Sum* cell_row(const void* rows, const RowMap& map, int n) const {
    return element<Sum>(rows, map, 0, block_.sequence(n), first(hidden()));
  }

  using Inputs = Units<BackwardInputs<Sum>, kItem>;

  // kLast: not to be asked for again, so that c of the step before takes the place of c.
  template <bool kLast = true>
  __device__ __forceinline__ Inputs inputs(int64_t s, const Moment& moment, int n, int j, int64_t unit,
                                           int valid) const {
    Sums gates[4], before{}, d_cells{};
#pragma unroll
    for (int gate = 0; gate < 4; ++gate)
      gates[gate] = read_copy<kItem>(block_.copy_of(s, n, gate), gate_row(moment.start, n, gate), j);
    if (moment.follows()) before = read_sums(block_.copy_of(s, n, kCells), j);
    if (from_.d_cells) d_cells = read_sums(block_.copy_of(s, n, kCellGrads), j);
    Sums& kept = block_.cells(n, j);
    const Sums c = kept;
    if constexpr (kLast) kept = before;
    Inputs result;
#pragma unroll
    for (int i = 0; i < kItem; ++i) {
      Sum c_prev = before.at[i];
      if (s == 0) c_prev = i < valid ? state_at<Number>(from_.state.c0, block_.sequence(n), unit + i) : 0;
      if (moment.forgets()) c_prev = 0;
      result.at[i] = {{gates[0].at[i], gates[1].at[i], gates[2].at[i], gates[3].at[i]}, c.at[i], c_prev, d_cells.at[i]};
    }
    return result;
  }

  static __device__ __forceinline__ Sums read_sums(const char* row, int j) {
    return *reinterpret_cast<const Sums*>(row + j * int{sizeof(Sum)});
  }

  // ---- A step -------------------------------------------------------------------------------------------------------

  // What an item reads before what others send.
  struct Given {
    Inputs inputs;
    Sums dy;
  };

  __device__ __forceinline__ Given given(int64_t s, int n, int j, int64_t unit, int valid) {
    const Moment moment = block_.moment(s, n);
    return {inputs(s, moment, n, j, unit, valid), output_grads(s, moment, n, j)};
  }

  __device__ __forceinline__ Given given_to_first(int64_t s) {
    Given found{};
    const int item = block_.first_item(s);
    if (!kNorm && !block_.projected() && item < block_.count() * hidden().items.value)
      block_.with_item(hidden(), item,
                       [&](int n, int j, int64_t unit, int valid) { found = given(s, n, j, unit, valid); });
    return found;
  }

  // What a thread has made of an item, and has still to store: others wait for the product of it.
  struct Made {
    int item = -1;
    StoredGrads<Tile, kItem> cells;
    Units<Number, kItem> d_h;  // without a projection
  };

  // Of a thread's items the last is left to be stored.
  __device__ __forceinline__ void take_step(int64_t s, Given now, Made& made) {
    made.item = -1;
    block_.for_items_from(block_.first_item(s), hidden(), [&](int item, int n, int j, int64_t unit, int valid) {
      if (made.item >= 0) {
        store(s, made);
        now = given(s, n, j, unit, valid);
      }
      const Moment moment = block_.moment(s, n);
      const Sums d_h = output(s, moment, n, j, unit, valid, now.dy);
      const Cells cells = update(s, moment, n, j, unit, valid, now.inputs, d_h);
      made = {item, stored_grads<Tile>(cells), narrow_units<Number>(d_h)};
    });
  }

  __device__ __forceinline__ void take_projected_step(int64_t s, Made& made) {
    block_.for_items(h(), [&](int n, int j, int64_t p, int valid) {
      const Moment moment = block_.moment(s, n);
      const Sums d_h = output(s, moment, n, j, p, valid, output_grads(s, moment, n, j));
      block_.team().put(Product::kProjection, n, j, d_h);
      store_output(s, moment, n, p, narrow_units<Number>(d_h), valid);
    });
    __syncthreads();  // the operand is there, and nobody reads the sums of the other product
    block_.template multiply<Product::kProjection>();
    __syncthreads();  // the sums of all warps are there
    block_.team().send(Product::kProjection, block_.count());
    block_.team().receive(Product::kProjection, block_.count());
    made.item = -1;
    if constexpr (kNorm)
      return take_normed_items(
          s, [&](const Moment&, int n, int j, int64_t, int) { return block_.team().sum(Product::kProjection, n, j); },
          made);
    block_.for_items_from(block_.first_item(s), hidden(), [&](int item, int n, int j, int64_t unit, int valid) {
      store(s, made);
      const Moment moment = block_.moment(s, n);
      const Sums d_hidden = block_.team().sum(Product::kProjection, n, j);
      const Inputs given = inputs(s, moment, n, j, unit, valid);
      const Cells cells = update(s, moment, n, j, unit, valid, given, d_hidden);
      made = {item, stored_grads<Tile>(cells), {}};
    });
  }

  // What was made of an item of step s.
  __device__ __forceinline__ void store(int64_t s, const Made& made) const {
    if (made.item < 0) return;
    block_.with_item(hidden(), made.item, [&](int n, int, int64_t unit, int valid) {
      const Moment moment = block_.moment(s, n);
      store_cell_grads<Tile, kOptions>(pass_, blockIdx.y, block_.rows(s, n), moment, s, block_.sequence(n), unit,
                                       made.cells, valid);
      if constexpr (kNorm) store_normed(s, moment, n, made.item, unit, valid);
      if (!block_.projected()) store_output(s, moment, n, unit, made.d_h, valid);
    });
  }

  __device__ __forceinline__ void store_output(int64_t s, const Moment& moment, int n, int64_t p,
                                               const Units<Number, kItem>& d_h, int valid) const {
    const int64_t b = block_.sequence(n);
    if constexpr (kOptions) {
      const Sums before = cell().template h_before<kItem>(from_.state, moment, s, place(s, n, p), valid);
      store_cell_output_grads(pass_, blockIdx.y, block_.rows(s, n), moment, b, p, before, d_h, valid);
    } else {
      store_output_grads(pass_, blockIdx.y, block_.rows(s, n), moment, s, b, p, d_h, valid);
    }
  }

  __device__ __forceinline__ Sums output_grads(int64_t s, const Moment& moment, int n, int j) const {
    if (!from_.dy) return {};
    return read_copy<kItem>(block_.copy_of(s, n, kOutputGrads), dy_row(moment.start, n), j);
  }

  // The gradient of elements p and following of h, which are numbers j and following of this rank's; of cells with
  // options that of what the step has computed as h.
  __device__ __forceinline__ Sums output(int64_t s, const Moment& moment, int n, int j, int64_t p, int valid,
                                         const Sums& dy) const {
    Sums d_h{};
    if (s + 1 < shape_.T) d_h = block_.team().sum(Product::kRecurrent, n, j);
    if constexpr (kOptions) add_kept(s, n, j, p, valid, d_h);
#pragma unroll
    for (int i = 0; i < kItem; ++i)
      d_h.at[i] =
          i < valid ? backward_output<Number>(from_, moment, block_.sequence(n), p + i, d_h.at[i], dy.at[i]) : 0;
    if constexpr (kOptions) pass_to_cell(s, moment, n, j, p, valid, d_h);
    return d_h;
  }

  // Units j and following of this rank: from the gradient of their h to those of their gates, for the operand, and of
  // their c, which the state gets.
  __device__ __forceinline__ Cells update(int64_t s, const Moment& moment, int n, int j, int64_t unit, int valid,
                                          const Inputs& given, const Sums& d_h) {
    Sums& state = block_.state(n, j);
    Sums d_c = state;
    Cells cells{};
    if constexpr (kOptions) {
      cells = cell().template backward<kItem>(from_, moment, place(s, n, unit), block_.peepholes(j), pass_.hidden_map,
                                              given, d_h, d_c, valid);
    }
    Units<Sum, 4 * kItem> sent;
#pragma unroll
    for (int i = 0; i < kItem; ++i) {
      if constexpr (!kOptions) {
        if (i < valid)
          cells.at[i] =
              backward_cell<Tile>(from_, moment, block_.sequence(n), unit + i, given.at[i], d_h.at[i], d_c.at[i]);
      }
      const GateValues<Sum> back = carried_back(moment, cells.at[i]);
      sent.at[4 * i] = back.i;
      sent.at[4 * i + 1] = back.f;
      sent.at[4 * i + 2] = back.g;
      sent.at[4 * i + 3] = back.o;
    }
    state = d_c;
    block_.team().put(Product::kRecurrent, n, 4 * j, sent);
    return cells;
  }

  // ---- Of cells with options ----------------------------------------------------------------------------------------

  using Step = CellStep<Tile, true>;
  __device__ __forceinline__ Step cell() const { return {params_.cell, static_cast<int>(blockIdx.y)}; }

  __device__ __forceinline__ void find_draw_keys_from(int64_t s) {
    if (!cell().draws()) return;
    block_.find_draw_keys_from(s, [&](const Moment& moment, int64_t step, int64_t b) {
      const LayerBackward& layer = pass_.layer;
      return cell().keys_of(moment,
                            Step::time_of(moment, layer.gates_map, layer.masks, shape_.T, from_.reverse, step, b), b);
    });
  }

  __device__ __forceinline__ Place place(int64_t s, int n, int64_t unit) const {
    return {0, block_.sequence(n), unit, &block_.draw_keys(s, n)};
  }

  // The gradient of h as the step before left it, from what the product has made, and what went past the step.
  __device__ __forceinline__ void add_kept(int64_t s, int n, int j, int64_t p, int valid, Sums& d_h) const {
    if (cell().drops_h()) {
#pragma unroll
      for (int i = 0; i < kItem; ++i)
        if (i < valid) d_h.at[i] *= cell().h_mask(place(s, n, p + i));
    }
    if (!cell().keeps_h()) return;
    const Sums kept = block_.h_state(h(), n, j);
#pragma unroll
    for (int i = 0; i < kItem; ++i) d_h.at[i] += kept.at[i];
  }

  __device__ __forceinline__ void pass_to_cell(int64_t s, const Moment& moment, int n, int j, int64_t p, int valid,
                                               Sums& d_h) const {
    Sums kept{};
#pragma unroll
    for (int i = 0; i < kItem; ++i)
      if (i < valid)
        d_h.at[i] = cell().output_backward(moment, place(s, n, p + i), block_.projected(), d_h.at[i], kept.at[i]);
    if (cell().keeps_h()) block_.h_state(h(), n, j) = kept;
  }

  // ---- Of cells that normalise --------------------------------------------------------------------------------------

  // A warp has a sequence, and its lanes the items of it: from c to the gradients of the sums, an item is the same
  // thread's.
  static_assert(!kNorm || kBatchTiles * kBatchColumns == kWarps);

  using Four = typename Normed<Tile>::Four;
  using NormUnit = typename Normed<Tile>::Unit;
  using Row = TeamRow<Sum, typename Block::TeamOf>;

  // Of a unit in a step. Once its gates have their gradients, `d_h` and `c` are what is stored: h before a projection,
  // and the gradient of gamma_h.
  struct alignas(16) Known {
    Sum d_h, c;       // c as the gates have made it
    Sum d_seen, out;  // the gradient of c as the output sees it; and that once it is activated
    Four d_pre;       // of the gates before their activation
  };

  __device__ __forceinline__ Normed<Tile> normed() const {
    return {params_.norm, static_cast<int>(blockIdx.y), shape_.H};
  }
  __device__ __forceinline__ NormUnit& norm_unit(int j) const { return block_.template norm_unit<NormUnit>(j); }
  __device__ __forceinline__ Known& known(int n, int j) const { return block_.template norm_known<Known>(n, j); }

  __device__ __forceinline__ Sum* normed_row(int64_t start, int n, int gate) const {
    return element<Sum>(params_.normed[blockIdx.y].normed, pass_.d_gates_map, start, block_.sequence(n),
                        gate * shape_.H + first(hidden()));
  }
  // Of the units of an item, what was normalised of each gate.
  __device__ __forceinline__ Units<Four, kItem> normed_gates(int64_t s, int n, int j) const {
    Sums rows[4];
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) rows[gate] = read_sums(block_.copy_of(s, n, kNormedGates + gate), j);
    Units<Four, kItem> units;
#pragma unroll
    for (int i = 0; i < kItem; ++i)
      units.at[i] = four_of(cell().in_cells_order({rows[0].at[i], rows[1].at[i], rows[2].at[i], rows[3].at[i]}));
    return units;
  }

  // c as the gates of step s have made it, which its moments are of: known before what others send of dh.
  __device__ __forceinline__ void find_c(int64_t s) {
    const int n = static_cast<int>(threadIdx.x) / 32;
    if (n >= block_.count()) return;
    const Moment moment = block_.moment(s, n);
    Units<Sum, 1> sum{};
    block_.for_items_of(n, hidden(), [&](int, int j, int64_t unit, int valid) {
      const Inputs given = inputs<false>(s, moment, n, j, unit, valid);
#pragma unroll
      for (int i = 0; i < kItem; ++i) {
        const Sum c = cell().c_clipped(raw_c(given.at[i], cell().g_mask(place(s, n, unit + i))));
        known(n, j + i).c = c;
        sum.at[0] += i < valid ? c : 0;
      }
    });
    own_c_ = row(n).own_part(sum, MeanOfUnits(), [&](const Units<Sum, 1>& mean) {
      Units<Sum, 1> squares{};
      block_.for_items_of(n, hidden(), [&](int, int j, int64_t, int valid) {
#pragma unroll
        for (int i = 0; i < kItem; ++i) {
          const Sum centred = known(n, j + i).c - mean.at[0];
          squares.at[0] += i < valid ? centred * centred : 0;
        }
      });
      return squares;
    });
  }

  __device__ __forceinline__ Row row(int n) { return {block_.team(), hidden(), n, block_.count()}; }
  __device__ __forceinline__ Sum raw_c(const BackwardInputs<Sum>& given, Sum mask) const {
    return cell().c_before_clip(given, mask, !normed().by_rows());
  }

  __device__ __forceinline__ void take_normed_step(int64_t s, Made& made) {
    made.item = -1;
    take_normed_items(
        s,
        [&](const Moment& moment, int n, int j, int64_t unit, int valid) {
          return output(s, moment, n, j, unit, valid, output_grads(s, moment, n, j));
        },
        made);
  }

  // From d_h_of(moment, n, j, unit, valid), the gradients of an item's hidden units.
  template <class DHOf>
  __device__ __forceinline__ void take_normed_items(int64_t s, const DHOf& d_h_of, Made& made) {
    const int n = static_cast<int>(threadIdx.x) / 32;
    if (n >= block_.count()) return;
    const Normed<Tile> norm = normed();
    const Moment moment = block_.moment(s, n);
    Row row = this->row(n);
    const auto for_items = [&](const auto& of_item) { block_.for_items_of(n, hidden(), of_item); };
    const auto found = row.statistics(own_c_, MeanOfUnits());
    const Moments<Sum> of_c = norm.moments(found.mean.at[0], found.variance.at[0]);

    // The gradient of c as the output sees it, and what goes into that of the normalised c.
    Units<Sum, 2> sums_of_c{};
    for_items([&](int, int j, int64_t unit, int valid) {
      const Sums d_h = d_h_of(moment, n, j, unit, valid);
      const Inputs given = inputs<false>(s, moment, n, j, unit, valid);
      Sums seen;
#pragma unroll
      for (int i = 0; i < kItem; ++i) seen.at[i] = norm_unit(j + i).scales.seen(of_c.normalised(known(n, j + i).c));
      const Sums out = cell().activated(seen);
#pragma unroll
      for (int i = 0; i < kItem; ++i) {
        Known of_unit = known(n, j + i);
        const auto weights = norm_unit(j + i).scales;
        const Sum normed_c = of_c.normalised(of_unit.c);
        of_unit.d_h = d_h.at[i];
        of_unit.out = out.at[i];
        Sum d_seen = d_h.at[i] * given.at[i].gates.o * cell().d_activated(of_unit.out);
        if (!norm.by_rows()) d_seen += c_grad(s, moment, n, j, unit, i, valid, given.at[i]).made;
        of_unit.d_seen = moment.active() && i < valid ? d_seen : 0;
        const Sum d_normed_c = i < valid ? of_unit.d_seen * weights.gamma_h : 0;
        sums_of_c.at[0] += d_normed_c;
        sums_of_c.at[1] += i < valid ? d_normed_c * normed_c : 0;
        known(n, j + i) = of_unit;
      }
    });
    const Units<Sum, 2> of_seen = row.sums(sums_of_c);
    const Sum part = 1 / static_cast<Sum>(shape_.H), mean_of_seen = of_seen.at[0] * part,
              along_seen = of_seen.at[1] * part;

    // The gradients of the gates before their activation, and of c before the step; what goes into those of the sums.
    Units<Sum, 8> sums_of_gates{};
    for_items([&](int, int j, int64_t unit, int valid) {
      const Units<Four, kItem> normed = normed_gates(s, n, j);
      const Inputs given = inputs(s, moment, n, j, unit, valid);
      Sums d_c_prev{}, c_prev{}, c_new{};
#pragma unroll
      for (int i = 0; i < kItem; ++i) {
        Known of_unit = known(n, j + i);
        const auto weights = norm_unit(j + i).scales;
        const Sum mask = cell().g_mask(place(s, n, unit + i)), normed_c = of_c.normalised(of_unit.c);
        const Sum d_c = of_c.scale * (of_unit.d_seen * weights.gamma_h - mean_of_seen - normed_c * along_seen);
        typename Step::CGrad grad = c_grad(s, moment, n, j, unit, i, valid, given.at[i]);
        grad.made = norm.by_rows() ? grad.made + d_c : d_c;
        BackwardCell<Sum> made_back = cell().template gates_backward<false>(
            block_.peephole(j + i), given.at[i], {mask, raw_c(given.at[i], mask), of_unit.out}, of_unit.d_h, grad);
        if (!moment.active() || i >= valid) made_back = {};
        d_c_prev.at[i] = moment.forgets() ? 0 : made_back.grad.d_c_prev;
        c_prev.at[i] = given.at[i].c_prev;
        c_new.at[i] = of_unit.c;
        of_unit = {made_back.hidden, of_unit.d_seen * normed_c, of_unit.d_seen, of_unit.out,
                   four_of(made_back.grad.d_pre)};
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) {
          const Sum d_normed = of_unit.d_pre.at[gate] * weights.gamma.at[gate];
          sums_of_gates.at[gate] += i < valid ? d_normed : 0;
          sums_of_gates.at[4 + gate] += i < valid ? d_normed * normed.at[i].at[gate] : 0;
        }
        known(n, j + i) = of_unit;
      }
      block_.state(n, j) = d_c_prev;
      if (!moment.active()) c_prev = c_new = {};
      cell().template store_cells<kItem>(moment, place(s, n, unit), pass_.hidden_map, c_prev, c_new, valid);
    });
    const Four scales = moment.active() ? gate_scales(moment, n) : Four{};  // while what others send is on its way
    const auto [di, df, dg, d_o, ai, af, ag, ao] = row.sums(sums_of_gates).at;
    const Four mean = norm.means({di, df, dg, d_o}, part), along = norm.means({ai, af, ag, ao}, part);

    // Those of the sums.
    for_items([&](int item, int j, int64_t, int valid) {
      store(s, made);
      const Units<Four, kItem> normed = normed_gates(s, n, j);
      Cells cells{};
      Units<Sum, 4 * kItem> sent;
#pragma unroll
      for (int i = 0; i < kItem; ++i) {
        const Known of_unit = known(n, j + i);
        const Four gamma = norm_unit(j + i).scales.gamma;
        const auto d_sum = [&](int gate) {
          return scales.at[gate] *
                 (of_unit.d_pre.at[gate] * gamma.at[gate] - mean.at[gate] - normed.at[i].at[gate] * along.at[gate]);
        };
        if (moment.active() && i < valid)
          cells.at[i] = {{cell().in_cells_order({d_sum(0), d_sum(1), d_sum(2), d_sum(3)}), 0}, of_unit.d_h};
        const GateValues<Sum> back = carried_back(moment, cells.at[i]);
        sent.at[4 * i] = back.i;
        sent.at[4 * i + 1] = back.f;
        sent.at[4 * i + 2] = back.g;
        sent.at[4 * i + 3] = back.o;
      }
      block_.team().put(Product::kRecurrent, n, 4 * j, sent);
      made = {item, stored_grads<Tile>(cells), {}};  // that of h is stored with a projection alone
    });
  }

  // Of the gradient of c as step s left it, of number i of the units of an item.
  __device__ __forceinline__ typename Step::CGrad c_grad(int64_t s, const Moment& moment, int n, int j, int64_t unit,
                                                         int i, int valid, const BackwardInputs<Sum>& given) const {
    Sum d_c = block_.state(n, j).at[i];
    if (moment.active() && moment.last())
      d_c = i < valid ? state_at<Number>(from_.dc_n, block_.sequence(n), unit + i) : 0;
    return cell().c_backward(place(s, n, unit + i), d_c + given.d_cells);
  }

  // 1 / deviation of what the gates i f g o were normalised by.
  __device__ __forceinline__ Four gate_scales(const Moment& moment, int n) const {
    const Sum* const at =
        element<Sum>(params_.normed[blockIdx.y].scales, params_.scales_map, moment.start, block_.sequence(n), 0);
    if (normed().by_rows()) return {at[0], at[0], at[0], at[0]};
    return four_of(cell().in_cells_order({at[0], at[1], at[2], at[3]}));
  }

  // What is known of an item, for the gradients of the weights that it is scaled and shifted by.
  __device__ __forceinline__ void store_normed(int64_t s, const Moment& moment, int n, int item, int64_t unit,
                                               int valid) const {
    if (!has_row(pass_.d_gates_map, moment)) return;
    const NormOutputs& to = params_.normed[blockIdx.y];
    const int j = (item - n * hidden().items.value) * kItem;
    const Units<Four, kItem> normed = normed_gates(s, n, j);
    Sums d_pre[4], products[4], d_seen, d_gamma_h;
#pragma unroll
    for (int i = 0; i < kItem; ++i) {
      const bool counts = moment.active() && i < valid;
      const Known of_unit = known(n, j + i);
      const auto in_weights_order = [&](const Four& gates, Sums(&rows)[4]) {
        const Four in_order = four_of(cell().in_cells_order(gates_of(gates)));
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) rows[gate].at[i] = counts ? in_order.at[gate] : 0;
      };
      Four product;
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) product.at[gate] = of_unit.d_pre.at[gate] * normed.at[i].at[gate];
      in_weights_order(of_unit.d_pre, d_pre);
      in_weights_order(product, products);
      d_seen.at[i] = counts ? of_unit.d_seen : 0;
      d_gamma_h.at[i] = counts ? of_unit.c : 0;
    }
    const int64_t b = block_.sequence(n);
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) {
      const int64_t at = gate * shape_.H + unit;
      store_units(element<Sum>(to.d_pre, pass_.d_gates_map, moment.start, b, at), d_pre[gate], valid);
      store_units(element<Sum>(to.normed, pass_.d_gates_map, moment.start, b, at), products[gate], valid);
    }
    if (!to.d_seen) return;
    store_units(element<Sum>(to.d_seen, pass_.hidden_map, moment.start, b, unit), d_seen, valid);
    store_units(element<Sum>(to.d_gamma_h, pass_.hidden_map, moment.start, b, unit), d_gamma_h, valid);
  }

  // The gradients of the initial state. An empty sequence has it as its final state.
  __device__ void finish() {
    if (from_.dh0) {
      block_.for_items(h(), [&](int n, int j, int64_t p, int valid) {
        Sums sums = block_.team().sum(Product::kRecurrent, n, j);
        if constexpr (kOptions) add_kept(0, n, j, p, valid, sums);
        store_initial(from_.dh0, shape_.P, from_.dh_n, n, p, sums, valid);
      });
    }
    if (!from_.dc0) return;
    block_.for_items(hidden(), [&](int n, int j, int64_t unit, int valid) {
      store_initial(from_.dc0, shape_.H, from_.dc_n, n, unit, block_.state(n, j), valid);
    });
  }

  __device__ __forceinline__ void store_initial(void* to, int64_t width, const Matrix& final_grad, int n, int64_t unit,
                                                Sums values, int valid) const {
    const int64_t b = block_.sequence(n);
    if (block_.is_empty(n)) {
#pragma unroll
      for (int i = 0; i < kItem; ++i) values.at[i] = i < valid ? state_at<Number>(final_grad, b, unit + i) : 0;
    }
    store_units(static_cast<Number*>(to) + b * width + unit, values, valid);
  }

  // How the ranks divide the hidden units, and h: the same without a projection. The columns of the recurrent product
  // are the four gates of each unit.
  __device__ const Share& hidden() const { return layout_.product[layout_.num_products - 1].rows; }
  __device__ const Share& h() const { return layout_[Product::kRecurrent].rows; }
  __device__ int64_t first(const Share& share) const { return int64_t{block_.team().rank()} * share.width; }
  __device__ int there(const Share& share) const {
    return min(share.width, share.limit - static_cast<int>(first(share)));
  }

  const Params& params_;
  const BackwardPass& pass_;
  const SequenceShape& shape_;
  const Layout& layout_;
  const BackwardDirection& from_;
  Block block_;
  typename Row::template Part<1> own_c_{};  // of a cell that normalises
};

template <class Tile, int kBatchTiles>
__global__ void __launch_bounds__(kThreads, 1)
    norm_sequence_backward(const __grid_constant__ NormSequenceBackward params) {
  BackwardWalk<Tile, kBatchTiles, Exchange::kAny, NormSequenceBackward>(params).run();
}

template <class Tile, int kBatchTiles, Exchange kExchange>
__global__ void __launch_bounds__(kThreads, 1) sequence_backward(const __grid_constant__ SequenceBackward params) {
  BackwardWalk<Tile, kBatchTiles, kExchange, SequenceBackward>(params).run();
}

template <class Tile, int kBatchTiles>
__global__ void __launch_bounds__(kThreads, 1)
    cell_sequence_backward(const __grid_constant__ WithCell<SequenceBackward> params) {
  BackwardWalk<Tile, kBatchTiles, Exchange::kAny, WithCell<SequenceBackward>>(params).run();
}

}  // namespace lstm_ext::cuda
