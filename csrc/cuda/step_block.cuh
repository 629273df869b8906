// A block of a launch for each step: its tile of the product, and which units of it each thread then finishes.
#pragma once

#include <algorithm>

#include "pointwise.cuh"
#include "step_tile.cuh"

namespace lstm_ext::cuda {

// Sums over the blocks of the cluster and of each over its splits, always in this order: of kRows times kItem rows,
// so far apart, of one sequence, whose first sum is at `partial`.
template <class Sum, int kRows, int kItem>
__device__ __forceinline__ Units<Units<Sum, kItem>, kRows> sums_of_rows(const Sum* partial, int apart, int blocks,
                                                                        int splits_log2, int split_stride) {
  Units<Units<Sum, kItem>, kRows> sums{};
  const auto add = [&](const Sum* at) {
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      const auto more = *reinterpret_cast<const Units<Sum, kItem>*>(at + n * apart);
#pragma unroll
      for (int i = 0; i < kItem; ++i) sums.at[n].at[i] += more.at[i];
    }
  };
  if (blocks == 1) {
#pragma unroll 2
    for (int split = 0; split < 1 << splits_log2; ++split) add(partial + split * split_stride);
  } else {
#pragma unroll(kRows == 1 ? 4 : 2)  // whose loads are under way at a time
    for (int n = 0; n < blocks << splits_log2; ++n)
      add(shared_of_rank(partial, n >> splits_log2) + (n & ((1 << splits_log2) - 1)) * split_stride);
  }
  return sums;
}

// Used as: a block of its own, `add` for each matrix that is multiplied, then `finish_items`, in which `product` is
// there. kTransposed: the weights lie as [columns, rows]; kGates: these rows are four gates, as in the product. `Rows`
// is what is known of a sequence's rows in memory, with kMoments moments: that of step s, or that of s + 1 too; and
// kUnits how many adjacent units a thread takes together.
template <class Tile, int kBatchTiles, bool kTransposed, class Rows, int kUnits = 1, bool kGates = false>
class StepBlock {
 public:
  static constexpr int kItem = kUnits;
  using Number = typename Tile::Number;
  using Sum = typename Tile::Sum;
  using Operands = LaneOperands<Tile, kTransposed>;
  static constexpr int kStageNumbers = kStageBytes / sizeof(Number);  // along k
  static constexpr int kChunkNumbers = kChunkBytes / sizeof(Number);
  static constexpr int kTiles = kStageNumbers / Tile::kK;  // k tiles of a stage
  static constexpr int kMostRows = kStepRows * kWarps;
  static constexpr int kMostSequences = std::min(kMostStepSequences, kWarps * kBatchTiles * kBatchColumns);
  static constexpr int kMoments = Rows::kMoments, kRowsSize = std::is_empty_v<Rows> ? 0 : sizeof(Rows);
  static constexpr int kKnown = kMoments * int{sizeof(Moment)} + kRowsSize;
  static_assert(kKnown == (kMoments == 2 && kRowsSize ? kStepBackwardKnown : kStepForwardKnown));

  // rows_of(moment, b): what is known of the rows of sequence b.
  template <class RowsOf>
  __device__ StepBlock(const StepPart& part, const SequenceShape& shape, const Masks& masks,
                       const int64_t* packed_offset, bool reverse, int64_t s, const RowsOf& rows_of)
      : part_(part),
        sequences_(part.warps_n() * kBatchTiles * kBatchColumns),
        k_block_(static_cast<int>(blockIdx.x) & (part.k_blocks() - 1)),
        row_block_((static_cast<int>(blockIdx.x) >> part.k_blocks_log2) % part.row_blocks),
        first_(int64_t{sequences_} * ((static_cast<int>(blockIdx.x) >> part.k_blocks_log2) / part.row_blocks)),
        count_(static_cast<int>(min(int64_t{sequences_}, shape.B - first_))),
        operands_(pair() * kStepRows, part.block_rows() + warp_n() * kBatchTiles * kBatchColumns, pitch()) {
    sums_.clear();
    const int n = threadIdx.x;
    if (n < count_) {
      const Moment moment = moment_at(masks, packed_offset, shape.T, reverse, s, first_ + n);
      moments()[n] = moment;
      if constexpr (kMoments == 2)
        moments()[sequences_ + n] = moment_at(masks, packed_offset, shape.T, reverse, s + 1, first_ + n);
      if constexpr (kRowsSize > 0) all_rows()[n] = rows_of(moment, first_ + n);
    }
    __syncthreads();  // the moments and rows are there
  }

  __device__ const Moment& moment(int n) const { return moments()[n]; }
  __device__ const Rows& rows(int n) const { return all_rows()[n]; }
  __device__ const Moment& next_moment(int n) const { return moments()[sequences_ + n]; }  // at step s + 1
  __device__ int64_t sequence(int n) const { return first_ + n; }

  // Adds weights [rows, columns], or transposed [columns, rows], times the operand whose row of sequence n, with as
  // many columns, starts at row_of(n); null stands for zeros.
  template <class Row>
  __device__ __forceinline__ void add(const Matrix& weights, int64_t columns, const Row& row_of) {
    if (find_rows(weights, columns, row_of)) {
      stream<true>(weights, columns);
    } else {
      stream<false>(weights, columns);
    }
  }

  // From here on a launch may read what earlier ones wrote, and write; the next may begin.
  __device__ void follow_previous_launch() const {
    wait_for_previous_launch();
    let_next_launch_start();
  }

  // The product's rows j, j + apart .. for sequence n, each with those of the units behind it in an item.
  template <int kRows = 1>
  __device__ __forceinline__ Units<Units<Sum, kItem>, kRows> product(int n, int j, int apart = 0) const {
    return sums_of_rows<Sum, kRows, kItem>(partial() + n * stride() + j, apart, part_.k_blocks(), part_.splits_log2(),
                                           sequences_ * stride());
  }

  // A thread has kItem units of the tile, from `unit` on, of every so many sequences of this block's share. From there
  // on there are `valid` units at all: less than kItem, or none, where the vector ends.
  __device__ int64_t unit() const { return int64_t{row_block_} * part_.rows.width + unit_in_tile(); }
  __device__ int valid() const { return part_.rows.limit - static_cast<int>(unit()); }

  // Calls body(n) for its sequences n.
  template <class Body>
  __device__ __forceinline__ void for_items(const Body& body) const {
    const int end = valid() > 0 ? count_ : 0;
    for (int n = first_sequence(); n < end; n += sequence_step()) body(n);
  }
  // The same for each unit: body(n, unit).
  template <class Body>
  __device__ __forceinline__ void for_units(const Body& body) const {
    const int units = min(kItem, valid());
    for_items([&](int n) {
      for (int i = 0; i < units; ++i) body(n, unit() + i);
    });
  }

  // Calls finish(n, j, load(n)) for its sequences n, where row j of the product is the first unit's first. What the
  // next sequence needs is loaded meanwhile; the first, before the sums meet. Not unrolled: more code than the
  // instruction cache holds takes longer to fetch than to run.
  template <class Loaded, class Load, class Finish>
  __device__ __forceinline__ void finish_items(const Load& load, const Finish& finish) {
    const int step = sequence_step(), end = valid() > 0 ? count_ : 0;
    int n = first_sequence();
    Loaded loaded{};
    if (n < end) loaded = load(n);
    finish_sums();
#pragma unroll 1
    for (; n < end; n += step) {
      const Loaded next = load(n + step < end ? n + step : n);  // whether it is needed or not: no branch
      finish(n, unit_in_tile(), loaded);
      loaded = next;
    }
    if (part_.k_blocks() > 1) cluster_meet();  // no block ends while others read its sums
  }

 private:
  // The sums of the warps go to shared memory, [split, sequences, stride], for `product` to add up.
  __device__ __forceinline__ void finish_sums() {
    const int first = (split() * sequences_ + warp_n() * kBatchTiles * kBatchColumns) * stride();
    sums_.store(partial() + first, stride(), pair() * kStepRows, part_.block_rows(), threadIdx.x % 32);
    if (part_.k_blocks() > 1) {
      cluster_sync();  // the sums of all warps of all blocks are there
    } else {
      __syncthreads();  // the sums of all warps are there
    }
  }

  // Where the rows of weights (unless transposed) and operand start; whether all consist of whole and aligned chunks.
  template <class Row>
  __device__ __forceinline__ bool find_rows(const Matrix& weights, int64_t columns, const Row& row_of) {
    const int rows = part_.block_rows(), width = part_.rows.width, n = threadIdx.x;
    const Number* data = static_cast<const Number*>(weights.data);
    const int64_t numbers_of_row = kTransposed ? part_.rows.limit : columns;  // as the weights lie in memory
    bool aligned = is_aligned(data) && is_aligned(data + weights.row_stride) && columns % kChunkNumbers == 0 &&
                   numbers_of_row % kChunkNumbers == 0;
    if constexpr (!kTransposed) {
      for (int row = threadIdx.x; row < rows; row += kThreads) {
        const int64_t unit = row_block_ * width + (row & (width - 1));
        const int64_t there = min(unit, int64_t{part_.rows.limit - 1});  // behind the last one it is that again, unused
        const int64_t index = (row >> part_.width_log2) * part_.rows.group_stride + there;
        row_starts()[row] = reinterpret_cast<const char*>(data + index * weights.row_stride);
      }
    }
    if (n < sequences_) {
      const Number* row = n < count_ ? row_of(n) : nullptr;
      operand_starts()[n] = reinterpret_cast<const char*>(row);
      aligned = aligned && is_aligned(row);
    }
    return !__syncthreads_or(!aligned);  // the rows are there
  }

  // All stages of the product, each copied while the two before it are multiplied.
  template <bool kAligned>
  __device__ __forceinline__ void stream(const Matrix& weights, int64_t columns) {
    const int stages = static_cast<int>((columns + kStageNumbers - 1) / kStageNumbers);
    const int first = stages * k_block_ >> part_.k_blocks_log2;
    const int end = stages * (k_block_ + 1) >> part_.k_blocks_log2;
    auto weight_chunks = chunks_of_weights<kAligned>(weights, columns, first);
    RowChunks<Number, kAligned, kMostSequences / kRowsTogether, true> operand_chunks(
        operand_starts(), sequences_, columns, part_.block_rows() * kStageBytes);
    const int stage_bytes = (part_.block_rows() + sequences_) * kStageBytes;
    char* at = work();
#pragma unroll 1
    for (int n = first; n < min(first + kStages - 1, end); ++n, at += stage_bytes)
      weight_chunks.copy(at, n);  // no launch has written them
    follow_previous_launch();
    at = work();
#pragma unroll 1
    for (int n = first; n < first + kStages - 1; ++n, at += stage_bytes) {
      if (n < end) operand_chunks.copy(at, n);
      cp_async_commit();
    }
    char* next = at;  // where the next stage is copied: in the place of the one that was multiplied before
    at = work();
    int slot = 0;
#pragma unroll 1
    for (int n = first; n < end; ++n) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // stage n is there, and stage n - 1 is read
      if (n + kStages - 1 < end) {
        weight_chunks.copy(next, n + kStages - 1);
        operand_chunks.copy(next, n + kStages - 1);
      }
      cp_async_commit();
      multiply(at);
      next = at;
      at += slot == kStages - 1 ? -(kStages - 1) * stage_bytes : stage_bytes;
      slot = slot == kStages - 1 ? 0 : slot + 1;
    }
    __syncthreads();  // the last stage is read
  }

  // What a thread copies of the weights, from stage `first` on.
  template <bool kAligned>
  __device__ __forceinline__ auto chunks_of_weights(const Matrix& weights, int64_t columns, int first) {
    constexpr int kMost = kMostRows / kRowsTogether;
    if constexpr (kTransposed) {
      constexpr int kChunkNumbersLog2 = kChunkNumbers == 8 ? 3 : kChunkNumbers == 4 ? 2 : 1;
      const int gate_chunks_log2 = part_.width_log2 - kChunkNumbersLog2;
      const int chunks_log2 = gate_chunks_log2 + (kGates ? 2 : 0), apart_log2 = kWarpsLog2 + 5 - chunks_log2;
      const int row = static_cast<int>(threadIdx.x) >> chunks_log2;
      const int chunk = static_cast<int>(threadIdx.x) & ((1 << chunks_log2) - 1);
      const int of_gate = kGates ? chunk & ((1 << gate_chunks_log2) - 1) : chunk;
      const int unit = row_block_ * part_.rows.width + of_gate * kChunkNumbers;
      const int64_t column = kGates ? (chunk >> gate_chunks_log2) * part_.rows.group_stride + unit : unit;
      const int bytes = max(0, min(kChunkNumbers, part_.rows.limit - unit)) * int{sizeof(Number)};
      static_assert(kThreads * kChunkNumbers / kMostRows % (Operands::kSwizzle + 1) == 0);  // so the same in its rows:
      const int swizzled = chunk ^ (row & Operands::kSwizzle) * Operands::kSwizzleStep;
      return ColumnChunks<Number, kAligned, kMost>(weights, columns, int64_t{first} * kStageNumbers + row, apart_log2,
                                                   column, bytes, part_.block_rows() / kRowsTogether,
                                                   row * pitch() + swizzled * kChunkBytes);
    } else {
      return RowChunks<Number, kAligned, kMost, false>(row_starts(), part_.block_rows(), columns, 0);
    }
  }

  __device__ __forceinline__ void multiply(const char* stage) {
    if (part_.splits() == 1) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) operands_.multiply(sums_, stage, tile);
    } else {
      for (int tile = split(); tile < kTiles; tile += part_.splits()) operands_.multiply(sums_, stage, tile);
    }
  }

  // Threads of all blocks along k, in their order: items side by side, then sequences. The width is a power of two.
  static constexpr int kItemLog2 = kItem == 2;
  static_assert(kItem == 1 << kItemLog2);
  __device__ int thread_along_k() const { return k_block_ * kThreads + static_cast<int>(threadIdx.x); }
  __device__ int unit_in_tile() const { return thread_along_k() << kItemLog2 & (part_.rows.width - 1); }
  __device__ int first_sequence() const { return thread_along_k() >> items_log2(); }
  __device__ int sequence_step() const { return kThreads << part_.k_blocks_log2 >> items_log2(); }
  __device__ int items_log2() const { return part_.width_log2 - kItemLog2; }

  // Warps 0, 1, .. take kStepRows rows each of the first sequences, then of the next, and then the next part of k.
  __device__ int warp() const { return static_cast<int>(threadIdx.x) / 32; }
  __device__ int pair() const { return warp() & ((1 << part_.warps_m_log2) - 1); }
  __device__ int warp_n() const { return warp() >> part_.warps_m_log2 & (part_.warps_n() - 1); }
  __device__ int split() const { return warp() >> (part_.warps_m_log2 + part_.warps_n_log2); }
  __device__ int stride() const { return part_.block_rows() + kPartialPadding; }
  __device__ int pitch() const { return part_.block_rows() * static_cast<int>(sizeof(Number)); }  // transposed

  __device__ Moment* moments() const { return reinterpret_cast<Moment*>(dynamic_shared()); }
  __device__ Rows* all_rows() const {
    return reinterpret_cast<Rows*>(dynamic_shared() + sequences_ * kMoments * int{sizeof(Moment)});
  }
  __device__ const char** row_starts() const {
    return reinterpret_cast<const char**>(dynamic_shared() + sequences_ * kKnown);
  }
  __device__ const char** operand_starts() const { return row_starts() + part_.block_rows(); }
  __device__ char* work() const { return dynamic_shared() + step_work_offset(sequences_, kKnown, part_.block_rows()); }
  __device__ Sum* partial() const { return reinterpret_cast<Sum*>(work()); }

  const StepPart& part_;
  int sequences_, k_block_, row_block_;
  int64_t first_;  // sequence of this tile of the batch
  int count_;
  Operands operands_;
  Sums<Tile, kBatchTiles> sums_;
};

}  // namespace lstm_ext::cuda
