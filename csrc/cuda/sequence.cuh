// One block of a team: its weights, its end of the exchange, where each of its sequences stands, and what it will read
// of global memory. The walks of both passes (sequence_forward.cuh, sequence_backward.cuh) have one, and say what
// happens in a step. Nothing that a step reads of global memory is read in that step: copies of the next step's rows to
// shared memory are under way meanwhile.
//
// Between the products a thread has items, each of a few units of a sequence. Where half of the threads have room for
// all items of a step, and for the copies, the two halves take turns: the other one stores and copies while nobody
// waits for it.
//
//   step          s                                s + 1                            s + 2
//   one half      items of s                       stores s, copies for s + 2       items of s + 2
//   the other     stores s - 1, copies for s + 1   items of s + 1                   stores s + 1, copies for s + 3
#pragma once

#include "team.cuh"

namespace lstm_ext::cuda {

// 16 bytes of row number `row` of those that are copied for each step, or fewer at its end: their number, and those
// after them in the row, is `bytes`. They come from `from`, so many strides of the row further as the step starts.
struct RowPiece {
  const char* from = nullptr;
  int bytes = -16, row = 0;
};

// To shared memory, at 16 bytes. A row of numbers of 2 bytes may miss a multiple of 4 by 2: it stands so much further
// behind there (see `read_copy`), and what a copy reads before it is in the same array.
__device__ __forceinline__ void copy_piece(char* to, const char* from, int bytes) {
  const auto address = reinterpret_cast<uintptr_t>(from);
  if (address % 16 == 0 && bytes >= 16) return cp_async_16(to, from);
  const int ahead = static_cast<int>(address % 4);
  from -= ahead;
#pragma unroll
  for (int at = 0; at < 16; at += 4) {
    const int left = bytes + ahead - at;
    if (left >= 4) cp_async_4(to + at, from + at);
    if (left == 2) *reinterpret_cast<uint16_t*>(to + at) = *reinterpret_cast<const uint16_t*>(from + at);
  }
}

// N units from j on of a row that was copied from `from`, as sums.
template <int N, class T>
__device__ __forceinline__ auto read_copy(const char* row, const T* from, int j) {
  Units<decltype(widen(T())), N> result;
  Units<T, N> numbers;
  if constexpr (sizeof(T) == 2) {
    static_assert(N == 2);
    const auto* words = reinterpret_cast<const uint32_t*>(row) + j / 2;
    const auto shift = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(from) % 4 * 8);
    numbers = bits_as<Units<T, N>>(__funnelshift_r(words[0], words[1], shift));
  } else {
    numbers = *reinterpret_cast<const Units<T, N>*>(row + j * int{sizeof(T)});
  }
#pragma unroll
  for (int n = 0; n < N; ++n) result.at[n] = widen(numbers.at[n]);
  return result;
}

// `Team` is Gather or Scatter. kDirection is 1 or -1: whether the steps are walked upwards.
// `Rows` is ForwardRows or BackwardRows.
template <class Tile, int kBatchTiles, class Team, class Rows, int kDirection>
class SequenceBlock {
  static_assert(sizeof(Rows) == kRowsBytes);

 public:
  using Sum = typename Tile::Sum;
  using TeamOf = Team;
  static constexpr int kItem = Team::kItem;
  // Registers hold the recurrent weights; what a projection has comes from shared memory in each step.
  using RecurrentWeights = OnChipWeights<Tile, kBatchTiles, Tile::kRegisterSteps>;
  using ProjectionWeights = OnChipWeights<Tile, kBatchTiles, 0>;

  __device__ SequenceBlock(const Layout& layout, const SequenceShape& shape, const Masks& masks,
                           const int64_t* packed_offset, bool reverse, const LayerWeights& weights)
      : layout_(layout),
        shape_(shape),
        masks_(masks),
        packed_offset_(packed_offset),
        reverse_(reverse),
        team_(layout),
        recurrent_(layout[Product::kRecurrent], team_.shared()),
        projection_(layout[Product::kProjection], team_.shared()) {
    load(Product::kRecurrent, recurrent_, weights.w_hh.data);
    if (projected()) load(Product::kProjection, projection_, weights.w_hr.data);
  }

  __device__ bool projected() const { return layout_.num_products == 2; }

  // Calls owner.walk() for each batch of sequences that is this team's.
  template <class Owner>
  __device__ __forceinline__ void for_batches(Owner& owner) {
    const int64_t each = layout_.team_batch;
    for (first_ = team_.team() * each; first_ < shape_.B; first_ += layout_.teams * each) {
      count_ = static_cast<int>(min(each, shape_.B - first_));
      const int most = max(layout_.units.value, layout_.input_pieces.value);
      turn_threads_ = owner.may_take_turns() && count_ * most <= kThreads / 2 ? kThreads / 2 : 0;
      owner.walk();
      __syncthreads();  // the next walk writes what the last step may still be reading
    }
    team_.leave();
  }

  // Whether the two halves of the threads take turns, and which one has the items of step s: all threads if they don't.
  __device__ bool takes_turns() const { return turn_threads_ > 0; }
  __device__ bool has_turn(int64_t s) const { return !takes_turns() || first_item(s) < kThreads / 2; }
  // The thread's first item of step s, if there are so many.
  __device__ int first_item(int64_t s) const {
    return static_cast<int>(threadIdx.x) ^ (static_cast<int>(s & 1) * turn_threads_);
  }

  // Calls body(n, j, unit, valid) for an item of a share of the units: kItem units of sequence n from unit j of this
  // rank on, which is `unit` of all, and of which the vector has `valid`.
  template <class Body>
  __device__ __forceinline__ void with_item(const Share& share, int item, const Body& body) const {
    const int n = share.items.quotient(item), j = (item - n * share.items.value) * kItem;
    const int unit = team_.rank() * share.width + j;
    body(n, j, int64_t{unit}, share.limit - unit);
  }
  // For all of a thread's items, of which the first is `item`.
  template <class Body>
  __device__ __forceinline__ void for_items_from(int item, const Share& share, const Body& body) const {
    for (; item < count_ * share.items.value; item += kThreads)
      with_item(share, item, [&](int n, int j, int64_t unit, int valid) { body(item, n, j, unit, valid); });
  }
  template <class Body>
  __device__ __forceinline__ void for_items(const Share& share, const Body& body) const {
    for_items_from(static_cast<int>(threadIdx.x), share,
                   [&](int, int n, int j, int64_t unit, int valid) { body(n, j, unit, valid); });
  }

  // For those items of sequence n that this lane has where a warp has all of them.
  template <class Body>
  __device__ __forceinline__ void for_items_of(int n, const Share& share, const Body& body) const {
#pragma unroll 1
    for (int at = static_cast<int>(threadIdx.x) % 32; at < share.items.value; at += 32) {
      const int j = at * kItem, unit = team_.rank() * share.width + j;
      body(n * share.items.value + at, j, int64_t{unit}, share.limit - unit);
    }
  }

  // Of this batch: how many sequences, and which of the layer's is its number n.
  __device__ int count() const { return count_; }
  __device__ int64_t sequence(int n) const { return first_ + n; }
  __device__ bool is_empty(int n) const { return length_of(masks_, shape_.T, first_ + n) == 0; }

  // Where the sequences stand at step s, and at those that are walked before and after it, and where these store. That
  // is found for several steps at once, as each waits for what it reads.
  __device__ const Moment& moment(int64_t s, int n) const { return moments()[found_at(s, n)]; }
  __device__ const Rows& rows(int64_t s, int n) const { return stored_rows()[found_at(s, n)]; }
  template <class Owner>
  __device__ __forceinline__ void find_moments(const Owner& owner, int64_t s) {
    if (moments_end_at(s)) find_moments_from(owner, s);
  }
  __device__ __forceinline__ bool moments_end_at(int64_t s) const {
    return s == first_moment_ + kMomentSteps * kDirection;
  }
  template <class Owner>
  __device__ __forceinline__ void find_moments_from(const Owner& owner, int64_t s) {
    __syncthreads();  // nobody reads the last ones
    first_buffer_ = buffer_of(s);
    first_moment_ = s;
    const int n = threadIdx.x % 32;
    for (int later = threadIdx.x / 32; later < kMoments && n < count_; later += kWarps) {
      const int64_t step = s + (later - 1) * kDirection;
      const Moment moment = moment_at(masks_, packed_offset_, shape_.T, reverse_, step, first_ + n);
      moments()[found_at(step, n)] = moment;
      stored_rows()[found_at(step, n)] = owner.rows_of(moment, first_ + n);
    }
    __syncthreads();  // they are there
  }

  // Of cells with options, found with the moments from s on: the keys of their random numbers, as each takes long to
  // make. keys_of(moment, step, b) makes those of one row.
  __device__ const DrawKeys& draw_keys(int64_t s, int n) const { return keys(s)[n]; }
  template <class KeysOf>
  __device__ __forceinline__ void find_draw_keys_from(int64_t s, const KeysOf& keys_of) {
    const int n = threadIdx.x % 32;
    for (int later = threadIdx.x / 32; later < kMomentSteps && n < count_; later += kWarps) {
      const int64_t step = s + later * kDirection;
      keys(step)[n] = keys_of(moment(step, n), step, first_ + n);
    }
    __syncthreads();  // they are there
  }

  // The rows that a step reads of a sequence: four of gates, and after them Owner::kSumRows of sums and dy.
  // owner.row(n, row) is the first piece of one, without bytes where there is none; owner.row_stride(row) are the bytes
  // from one start to the next, and owner.of_step_before(row) tells whether it is that of the step before. To be called
  // before the first copies of a batch.
  template <class Owner>
  __device__ __forceinline__ void find_copies(const Owner& owner) {
    first_piece_ = piece_of(owner, first_copied());
  }

  // Of the rows that step s will read, if there is such a step; always one group of copies. Where threads take turns,
  // by those that will have its items, and have none of the step that is walked meanwhile. A thread has a piece; where
  // there are more of them, it finds the others as it goes.
  template <class Owner>
  __device__ __forceinline__ void copy_inputs(const Owner& owner, int64_t s) const {
    if (s >= 0 && s < shape_.T && has_turn(s)) {
      const int count = count_ * layout_.input_pieces.value, step = takes_turns() ? kThreads / 2 : kThreads;
      int index = first_copied();
      if (index < count) copy(owner, first_piece_, index, s);
      for (index += step; index < count; index += step) copy(owner, piece_of(owner, index), index, s);
    }
    cp_async_commit();
  }

  // Row `row` of the copies for sequence n at step s.
  __device__ __forceinline__ char* copy_of(int64_t s, int n, int row) const {
    const int place = row < 4 ? row * layout_.gate_row : 4 * layout_.gate_row + (row - 4) * layout_.cell_row;
    return copies_of(s) + n * layout_.input_pieces.value * 16 + place;
  }

  // c between the steps, or its gradient, from unit j on of sequence n; and backward c of the step itself, forward of
  // cells that normalise as its gates have made it.
  __device__ Units<Sum, kItem>& state(int n, int j) const { return units_at(layout_.state_offset, n, j); }
  __device__ Units<Sum, kItem>& cells(int n, int j) const { return units_at(layout_.cells_offset, n, j); }

  // Of cells with options: what is kept of h from unit j on of sequence n, and the peephole of unit j.
  __device__ Units<Sum, kItem>& h_state(const Share& h, int n, int j) const {
    return item_at(layout_.h_state_offset, n * h.items.value + j / kItem);
  }
  __device__ GateValues<Sum>& peephole(int j) const {
    return reinterpret_cast<GateValues<Sum>*>(team_.shared() + layout_.peephole_offset)[j];
  }
  // Those of an item.
  __device__ __forceinline__ Units<GateValues<Sum>, kItem> peepholes(int j) const {
    Units<GateValues<Sum>, kItem> of_item;
#pragma unroll
    for (int i = 0; i < kItem; ++i) of_item.at[i] = peephole(j + i);
    return of_item;
  }

  // Of cells that normalise: by what unit j is scaled and shifted; and backward, what is known of it in sequence n.
  template <class Unit>
  __device__ Unit& norm_unit(int j) const {
    constexpr int kBytes = kNormUnitNumbers * int{sizeof(Sum)};
    static_assert(sizeof(Unit) <= kBytes);
    return *reinterpret_cast<Unit*>(team_.shared() + layout_.norm_offset + j * kBytes);
  }
  template <class Known>
  __device__ Known& norm_known(int n, int j) const {
    static_assert(sizeof(Known) == kNormKnownNumbers * sizeof(Sum));
    return reinterpret_cast<Known*>(team_.shared() + layout_.norm_known_offset)[n * layout_.units.value * kItem + j];
  }

  __device__ Team& team() { return team_; }
  __device__ const Team& team() const { return team_; }

  // This rank's weights times the operand, which all threads know to be there.
  template <Product kWhich>
  __device__ __forceinline__ void multiply() const {
    const ProductLayout& product = layout_[kWhich];
    const auto run = [&](const auto& weights) {
      weights.multiply(product, team_.operand(kWhich), team_.partial(), product.partial_stride);
    };
    if constexpr (kWhich == Product::kRecurrent) {
      run(recurrent_);
    } else {
      run(projection_);
    }
  }

 private:
  template <class Weights>
  __device__ void load(Product which, Weights& to, const void* weights) const {
    const ProductLayout& product = layout_[which];
    const int rank = team_.rank();
    if constexpr (kDirection > 0) {
      to.load(product, weights, rank * product.rows.per_rank(), 0);
    } else {
      to.load(product, weights, 0, rank * product.columns.per_rank());
    }
  }

  // Without turns the last warps come first, as items are with the first.
  __device__ __forceinline__ int first_copied() const {
    return takes_turns() ? static_cast<int>(threadIdx.x) % (kThreads / 2)
                         : kThreads - 1 - static_cast<int>(threadIdx.x);
  }

  template <class Owner>
  __device__ __forceinline__ RowPiece piece_of(const Owner& owner, int index) const {
    const int n = layout_.input_pieces.quotient(index), at = index - n * layout_.input_pieces.value;
    int row = layout_.gate_pieces.quotient(at), piece = at - row * layout_.gate_pieces.value;
    if (kDirection < 0 && row >= 4) {
      const int pieces = layout_.cell_row / 16;
      piece = at - 4 * layout_.gate_pieces.value, row = 4;
      while (row < 4 + Owner::kSumRows && piece >= pieces) piece -= pieces, ++row;
    }
    RowPiece found = owner.row(n, row);
    if (found.bytes <= 0) return {};
    found.row = row;
    found.from += piece * 16;
    found.bytes -= piece * 16;
    return found;
  }

  template <class Owner>
  __device__ __forceinline__ void copy(const Owner& owner, const RowPiece& piece, int index, int64_t s) const {
    const Moment& moment = this->moment(s, layout_.input_pieces.quotient(index));
    const bool before = owner.of_step_before(piece.row);
    if (!(before ? moment.follows() : moment.active()) || piece.bytes <= -4) return;  // up to 2 bytes further behind
    const int64_t start = before ? moment.start_before : moment.start;
    copy_piece(copies_of(s) + index * 16, piece.from + start * owner.row_stride(piece.row), piece.bytes);
  }

  // Which buffer has the copies for step s. Three take turns: those of a step are made before all warps are through
  // with the step two before it.
  __device__ __forceinline__ int buffer_of(int64_t s) const {
    const int later = static_cast<int>(s - first_moment_) * kDirection;
    return static_cast<int>(static_cast<unsigned>(first_buffer_ + later) % 3u);
  }
  __device__ __forceinline__ char* copies_of(int64_t s) const {
    return team_.shared() + layout_.inputs_offset + buffer_of(s) * layout_.inputs_bytes;
  }

  // Among what is found for several steps, the place of step s and sequence n.
  __device__ int found_at(int64_t s, int n) const {
    return (1 + static_cast<int>(s - first_moment_) * kDirection) * layout_.team_batch + n;
  }
  __device__ Moment* moments() const { return reinterpret_cast<Moment*>(team_.shared() + layout_.moments_offset); }
  __device__ Rows* stored_rows() const { return reinterpret_cast<Rows*>(team_.shared() + layout_.rows_offset); }

  __device__ DrawKeys* keys(int64_t s) const {
    return reinterpret_cast<DrawKeys*>(team_.shared() + layout_.draw_keys_offset) +
           static_cast<int>(s - first_moment_) * kDirection * layout_.team_batch;
  }

  __device__ Units<Sum, kItem>& units_at(int offset, int n, int j) const {
    return item_at(offset, n * layout_.units.value + j / kItem);
  }
  __device__ Units<Sum, kItem>& item_at(int offset, int item) const {
    return reinterpret_cast<Units<Sum, kItem>*>(team_.shared() + offset)[item];
  }

  const Layout& layout_;
  const SequenceShape& shape_;
  const Masks& masks_;
  const int64_t* packed_offset_;
  const bool reverse_;
  Team team_;
  RecurrentWeights recurrent_;
  ProjectionWeights projection_;
  int64_t first_ = 0;  // sequence of this batch
  int count_ = 0, turn_threads_ = 0;
  int64_t first_moment_ = 0;
  int first_buffer_ = 0;  // of the step that has the first moment
  RowPiece first_piece_;
};

}  // namespace lstm_ext::cuda
