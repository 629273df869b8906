// One step of a layer in a launch, two with a projection: nothing needs to fit on chip, and nothing to wait for. A
// block takes warps_m * 32 rows of the weights, as they lie in global memory, and a tile of the batch; the warps divide
// the rows and, within, k. Here warps_m = 2:
//
//                chunk 0            chunk 1  ...     k, kChunkTiles tiles in a chunk
//   32 rows   0 2 4 6 0 2 4 6 ... | 0 2 4 6          the warp that takes the tile
//   32 rows   1 3 5 7 1 3 5 7 ... | 1 3 5 7
//
// A chunk of the operand is staged in shared memory for all warps; the sums stay in registers until the last chunk is
// done, and are then added up over the warps of the same rows where the operand was.
#pragma once

#include "pointwise.cuh"
#include "product.cuh"

namespace lstm_ext::cuda {

inline constexpr int kChunkTiles = 32;  // k tiles of the operand that are in shared memory at a time

// Used as: a block of its own, `add` for each matrix that is multiplied, `finish_sums`, then `product` in for_units.
template <class Tile, int kBatchTiles>
class StepBlock {
 public:
  using Number = typename Tile::Number;
  using OnChip = typename Tile::OnChip;
  using Sum = typename Tile::Sum;
  static constexpr int kSequences = kBatchTiles * kBatchColumns;
  static constexpr int kChunk = kChunkTiles * Tile::kK;
  static constexpr int kNextOffset = kSequences * static_cast<int>(sizeof(Moment));
  static constexpr int kWorkOffset = step_work_offset(kSequences);
  static constexpr int kOperandBytes = kChunk * kSequences * static_cast<int>(sizeof(OnChip));
  static_assert(kOperandBytes <= kWarps * kStepRows * kSequences * int{sizeof(Sum)}, "they lie where the sums do");

  __device__ StepBlock(const StepPart& part, const SequenceShape& shape, const Masks& masks,
                       const int64_t* packed_offset, bool reverse, int64_t s)
      : part_(part),
        block_(static_cast<int>(blockIdx.x % part.row_blocks)),
        first_(static_cast<int64_t>(blockIdx.x / part.row_blocks) * kSequences),
        count_(static_cast<int>(min(int64_t{kSequences}, shape.B - first_))) {
    sums_.clear();
    const int n = threadIdx.x;
    if (n < count_) {
      moments()[n] = moment_at(masks, packed_offset, shape.T, reverse, s, first_ + n);
      next_moments()[n] = moment_at(masks, packed_offset, shape.T, reverse, s + 1, first_ + n);
    }
    __syncthreads();  // the moments are there
  }

  __device__ const Moment& moment(int n) const { return moments()[n]; }
  __device__ const Moment& next_moment(int n) const { return next_moments()[n]; }  // at step s + 1
  __device__ int64_t sequence(int n) const { return first_ + n; }

  // Adds weights [rows, columns] times the operand whose element (k, n) is value(k, n): as many chunks as it takes.
  template <class Value>
  __device__ void add(const Matrix& weights, int64_t row_stride, int64_t column_stride, int64_t columns,
                      const Value& value) {
    RowPointers weight_rows(*this, static_cast<const Number*>(weights.data), row_stride, column_stride);
    OnChip* operand = reinterpret_cast<OnChip*>(work());
    for (int64_t start = 0; start < columns; start += kChunk) {
      const int width = static_cast<int>(min(int64_t{kChunk}, columns - start));
      const int tiles = (width + Tile::kK - 1) / Tile::kK;
      for (int n = threadIdx.x / 32; n < kSequences; n += kWarps)
        for (int k = threadIdx.x % 32; k < tiles * Tile::kK; k += 32)
          operand[operand_index<Tile, kBatchTiles>(k, n)] =
              k < width && n < count_ ? value(start + k, n) : OnChip(Tile::on_chip(0));
      __syncthreads();  // the operand is there
#pragma unroll 2
      for (int tile = split(); tile < tiles; tile += splits()) {
        uint4 numbers[Tile::kRowTiles];
        weight_rows.fetch(numbers, start + tile * Tile::kK, columns);
        sums_.add(numbers, operand + tile * kBatchTiles * Tile::kK * kBatchColumns, threadIdx.x % 32);
      }
      __syncthreads();  // the operand is read
    }
  }

  // The sums of the warps go to shared memory, [split, sequences, stride], for `product` to add up.
  __device__ void finish_sums() {
    sums_.store(partial() + split() * kSequences * stride(), stride(), pair() * kStepRows, row_count(),
                threadIdx.x % 32);
    __syncthreads();  // the sums of all warps are there
  }

  // The product's row j for sequence n.
  __device__ Sum product(int n, int j) const {
    return total_of_rows(partial() + n * stride() + j, splits(), kSequences * stride());
  }

  // Calls body(n, j, unit) for this block's units of each sequence n, one thread each.
  template <class Body>
  __device__ void for_units(const Body& body) const {
    const int width = part_.rows.width;
    for (int index = threadIdx.x; index < count_ * width; index += kThreads) {
      const int j = index % width;
      const int64_t unit = static_cast<int64_t>(block_) * width + j;
      if (unit < part_.rows.limit) body(index / width, j, unit);
    }
  }

 private:
  // The rows of the weights that a lane reads.
  struct RowPointers {
    static constexpr int kNumbers = 16 / sizeof(OnChip);
    static constexpr int kLaneRows = Tile::kM == 16 ? 2 : 1;  // in each tile
    // In bf16 and fp16 two columns are adjacent in a lane, in the plain tiles all.
    static constexpr int kAdjacent = sizeof(OnChip) == 2 ? 2 : Tile::kM == 16 ? 1 : kNumbers;

    struct alignas(kAdjacent * sizeof(Number)) Adjacent {
      Number at[kAdjacent];
    };

    const Number* row[Tile::kRowTiles][kLaneRows];  // null past the last
    int64_t column_stride;
    bool adjacent;  // columns lie side by side, and are aligned to be read together

    __device__ RowPointers(const StepBlock& block, const Number* data, int64_t row_stride, int64_t stride)
        : column_stride(stride),
          adjacent(stride == 1 && row_stride % kAdjacent == 0 &&
                   reinterpret_cast<uintptr_t>(data) % sizeof(Adjacent) == 0) {
      const int lane = threadIdx.x % 32;
      const Slices& rows = block.part_.rows;
#pragma unroll
      for (int m = 0; m < Tile::kRowTiles; ++m) {
#pragma unroll
        for (int r = 0; r < kLaneRows; ++r) {
          const int j = block.pair() * kStepRows + m * Tile::kM + Tile::row(lane, 0) + r * 8;
          const int64_t index = j < rows.per_rank() ? rows.index_of(block.block_ * rows.per_rank() + j) : -1;
          row[m][r] = index < 0 ? nullptr : data + index * row_stride;
        }
      }
    }

    // A lane's numbers of the tile whose first column is `start`; zeros where there are no weights.
    __device__ __forceinline__ void fetch(uint4 (&tiles)[Tile::kRowTiles], int64_t start, int64_t columns) const {
      const int lane = threadIdx.x % 32;
#pragma unroll
      for (int m = 0; m < Tile::kRowTiles; ++m) {
        struct Numbers {
          OnChip at[kNumbers];
        } numbers;
#pragma unroll
        for (int n = 0; n < kNumbers; n += kAdjacent) {
          const Number* from = row[m][(Tile::row(lane, n) - Tile::row(lane, 0)) / 8];
          const int64_t column = start + Tile::column(lane, n);
          Adjacent read = {};
          if (from && adjacent && column + kAdjacent <= columns) {
            read = *reinterpret_cast<const Adjacent*>(from + column);
          } else if (from) {
#pragma unroll
            for (int i = 0; i < kAdjacent; ++i)
              if (column + i < columns) read.at[i] = from[(column + i) * column_stride];
          }
#pragma unroll
          for (int i = 0; i < kAdjacent; ++i) numbers.at[n + i] = Tile::keep(read.at[i]);
        }
        tiles[m] = bits_as<uint4>(numbers);
      }
    }
  };

  // Warps 0, 1, .. take one pair of row tiles (kStepRows rows) each, warps_m more the same with the next part of k.
  __device__ int pair() const { return static_cast<int>(threadIdx.x) / 32 % part_.warps_m; }
  __device__ int split() const { return static_cast<int>(threadIdx.x) / 32 / part_.warps_m; }
  __device__ int splits() const { return kWarps / part_.warps_m; }
  __device__ int row_count() const { return part_.warps_m * kStepRows; }
  __device__ int stride() const { return row_count() + kPartialPadding; }
  __device__ Moment* moments() const { return reinterpret_cast<Moment*>(dynamic_shared()); }
  __device__ Moment* next_moments() const { return reinterpret_cast<Moment*>(dynamic_shared() + kNextOffset); }
  __device__ char* work() const { return dynamic_shared() + kWorkOffset; }
  __device__ Sum* partial() const { return reinterpret_cast<Sum*>(work()); }

  const StepPart& part_;
  int block_;
  int64_t first_;  // sequence of this tile of the batch
  int count_;
  StepSums<Tile, kBatchTiles> sums_;
};

// ---- Forward --------------------------------------------------------------------------------------------------

// Product::kRecurrent: x W_ih' if x is given, h W_hh', and the pointwise part. Without a projection this is all.
template <class Tile, int kBatchTiles>
__device__ __forceinline__ void step_gates(const StepForward& params, StepBlock<Tile, kBatchTiles>& block, int d) {
  using Number = typename Tile::Number;
  using Sum = typename Tile::Sum;
  const LayerForward& layer = params.layer;
  const ForwardDirection& to = layer.direction[d];
  const int64_t H = layer.shape.H, s = params.s;
  if (layer.x) {
    const auto x = [&](int64_t k, int n) {
      return Tile::keep(*element<Number>(layer.x, layer.x_map, block.moment(n).start, block.sequence(n), k));
    };
    block.add(to.weights.w_ih, to.weights.w_ih.row_stride, 1, layer.shape.I, x);
  }
  const auto h = [&](int64_t k, int n) {
    const Moment& moment = block.moment(n);
    if (!moment.active || moment.forgets) return Tile::on_chip(0);
    if (s == 0) return Tile::on_chip(state_at<Number>(to.state.h0, block.sequence(n), k));
    return Tile::keep(*element<Number>(to.y, layer.y_map, moment.start_before, block.sequence(n), k));
  };
  if (s > 0 || to.state.h0.data) {
    block.add(to.weights.w_hh, params.part.row_stride, params.part.column_stride, layer.shape.P, h);
  }
  block.finish_sums();
  block.for_units([&](int n, int j, int64_t unit) {
    const Moment& moment = block.moment(n);
    const int64_t b = block.sequence(n);
    const int64_t state_index = (d * layer.shape.B + b) * H + unit;
    const Sum before = s == 0 ? state_at<Number>(to.state.c0, b, unit) : static_cast<Sum*>(params.state)[state_index];
    if (s == 0 && length_of(layer.masks, layer.shape.T, b) == 0)
      static_cast<Number*>(to.c_n)[b * H + unit] = narrow<Number>(before);
    Sum c = moment.forgets ? 0 : before;
    const int width = params.part.rows.width;
    Pre<Tile> pre{};
    if (moment.active) {
      pre = plus(Pre<Tile>{block.product(n, j), block.product(n, width + j), block.product(n, 2 * width + j),
                           block.product(n, 3 * width + j)},
                 bias_of<Tile>(to.weights, H, unit));
      if (params.xw[d]) pre = plus(read_gates<Sum>(params.xw[d], layer.gates_map, moment.start, b, H, unit), pre);
    }
    const Units<CellState<Sum>, 1> cell{{forward_cell<Tile>(moment, pre, c)}};
    const Units<Sum, 1> out{{moment.active ? cell_output<typename Tile::Math>(cell.at[0].gates.o, cell.at[0].c) : 0}};
    store_cells<Tile>(layer, to, moment, b, unit, cell, 1);
    if (params.state) static_cast<Sum*>(params.state)[state_index] = carried(moment, cell.at[0].c);
    if (params.hidden) {
      static_cast<Number*>(params.hidden)[state_index] = narrow<Number>(out.at[0]);
    } else {
      store_output<Tile>(layer, to, moment, b, unit, out, 1);
    }
  });
}

// Product::kProjection: from the hidden units that the launch before has left in memory to h.
template <class Tile, int kBatchTiles>
__device__ __forceinline__ void step_projection(const StepForward& params, StepBlock<Tile, kBatchTiles>& block, int d) {
  using Number = typename Tile::Number;
  const LayerForward& layer = params.layer;
  const ForwardDirection& to = layer.direction[d];
  const auto hidden = [&](int64_t k, int n) {
    return Tile::keep(
        static_cast<const Number*>(params.hidden)[(d * layer.shape.B + block.sequence(n)) * layer.shape.H + k]);
  };
  block.add(to.weights.w_hr, params.part.row_stride, params.part.column_stride, layer.shape.H, hidden);
  block.finish_sums();
  block.for_units([&](int n, int j, int64_t p) {
    const Units<typename Tile::Sum, 1> h{{block.product(n, j)}};
    store_output<Tile>(layer, to, block.moment(n), block.sequence(n), p, h, 1);
  });
}

// A sequence of length 0 ends with the h that it starts from.
template <class Tile>
__device__ void keep_initial_h(const LayerForward& layer, const ForwardDirection& to, int64_t b, int64_t p) {
  using Number = typename Tile::Number;
  if (length_of(layer.masks, layer.shape.T, b) == 0)
    static_cast<Number*>(to.h_n)[b * layer.shape.P + p] = narrow<Number>(state_at<Number>(to.state.h0, b, p));
}

template <class Tile, int kBatchTiles>
__global__ void __launch_bounds__(kThreads, 2) step_forward(const __grid_constant__ StepForward params) {
  const int d = blockIdx.y;
  const LayerForward& layer = params.layer;
  StepBlock<Tile, kBatchTiles> block(params.part, layer.shape, layer.masks, layer.gates_map.packed_offset,
                                     layer.direction[d].reverse, params.s);
  const bool makes_h = params.part.product == Product::kProjection || !params.hidden;
  if (makes_h && params.s == 0) {
    block.for_units(
        [&](int n, int, int64_t p) { keep_initial_h<Tile>(layer, layer.direction[d], block.sequence(n), p); });
  }
  if (params.part.product == Product::kRecurrent) {
    step_gates(params, block, d);
  } else {
    step_projection(params, block, d);
  }
}

// ---- Backward -------------------------------------------------------------------------------------------------

// The pointwise part of a unit from the gradient of its h; the gradient of c stays in memory for the next launch.
template <class Tile, int kBatchTiles>
__device__ __forceinline__ void step_cell_backward(const StepBackward& params, StepBlock<Tile, kBatchTiles>& block,
                                                   int d, int n, int64_t unit, typename Tile::Sum d_h) {
  using Number = typename Tile::Number;
  const LayerBackward& layer = params.pass.layer;
  const BackwardDirection& from = layer.direction[d];
  const SequenceShape& shape = layer.shape;
  const int64_t b = block.sequence(n);
  auto* state = static_cast<typename Tile::Sum*>(params.state) + (d * shape.B + b) * shape.H + unit;
  typename Tile::Sum d_c = params.s + 1 < shape.T ? *state : 0;
  const Moment& moment = block.moment(n);
  BackwardInputs<typename Tile::Sum> inputs{};
  if (moment.active) {
    using Sum = typename Tile::Sum;
    inputs.gates = read_gates<Number>(from.gates, layer.gates_map, moment.start, b, shape.H, unit);
    inputs.c = *element<Sum>(from.cells, layer.cells_map, moment.start, b, unit);
    if (!moment.forgets)
      inputs.c_prev = params.s > 0 ? *element<Sum>(from.cells, layer.cells_map, moment.start_before, b, unit)
                                   : state_at<Number>(from.state.c0, b, unit);
    if (from.d_cells) inputs.d_cells = *element<Sum>(from.d_cells, layer.d_cells_map, moment.start, b, unit);
  }
  const Units<BackwardCell<typename Tile::Sum>, 1> cell{{backward_cell<Tile>(from, moment, b, unit, inputs, d_h, d_c)}};
  store_cell_grads<Tile>(params.pass, d, moment, params.s, b, unit, cell, 1);
  *state = d_c;
  if (params.s > 0 || !from.dc0) return;
  if (length_of(layer.masks, shape.T, b) == 0) d_c = state_at<Number>(from.dc_n, b, unit);
  static_cast<Number*>(from.dc0)[b * shape.H + unit] = narrow<Number>(d_c);
}

// From the gates' gradients of step s + 1 to that of h after step s, and without a projection on to the gates'.
template <class Tile, int kBatchTiles>
__device__ __forceinline__ void step_h_backward(const StepBackward& params, StepBlock<Tile, kBatchTiles>& block,
                                                int d) {
  using Number = typename Tile::Number;
  using Sum = typename Tile::Sum;
  const BackwardPass& pass = params.pass;
  const BackwardDirection& from = pass.layer.direction[d];
  const SequenceShape& shape = pass.layer.shape;
  const auto d_gates = [&](int64_t k, int n) {
    const Moment& next = block.next_moment(n);
    return next.active && !next.forgets ? Tile::keep(*element<Number>(pass.outputs[d].d_gates, pass.d_gates_map,
                                                                      next.start, block.sequence(n), k))
                                        : Tile::on_chip(0);
  };
  if (params.s + 1 < shape.T) {
    block.add(from.weights.w_hh, params.part.row_stride, params.part.column_stride, 4 * shape.H, d_gates);
  }
  block.finish_sums();
  block.for_units([&](int n, int j, int64_t p) {
    const int64_t b = block.sequence(n);
    if (params.s < 0) {
      const bool empty = length_of(pass.layer.masks, shape.T, b) == 0;
      const Sum d_h = empty ? state_at<Number>(from.dh_n, b, p) : block.product(n, j);
      static_cast<Number*>(from.dh0)[b * shape.P + p] = narrow<Number>(d_h);
    } else {
      const Moment& moment = block.moment(n);
      Sum dy = 0;
      if (moment.active && from.dy) dy = widen(*element<Number>(from.dy, pass.layer.dy_map, moment.start, b, p));
      const Sum d_h = backward_output<Number>(from, moment, b, p, block.product(n, j), dy);
      store_output_grads<Tile>(pass, d, moment, params.s, b, p, Units<Sum, 1>{{d_h}}, 1);
      if (!shape.projected) step_cell_backward(params, block, d, n, p, d_h);
    }
  });
}

// From the gradient of h, which the launch before has left in d_h, through w_hr to that of the hidden units.
template <class Tile, int kBatchTiles>
__device__ __forceinline__ void step_projection_backward(const StepBackward& params,
                                                         StepBlock<Tile, kBatchTiles>& block, int d) {
  using Number = typename Tile::Number;
  const BackwardPass& pass = params.pass;
  const auto d_h = [&](int64_t k, int n) {
    const Moment& moment = block.moment(n);
    return moment.active
               ? Tile::keep(*element<Number>(pass.outputs[d].d_h, pass.h_map, moment.start, block.sequence(n), k))
               : Tile::on_chip(0);
  };
  block.add(pass.layer.direction[d].weights.w_hr, params.part.row_stride, params.part.column_stride, pass.layer.shape.P,
            d_h);
  block.finish_sums();
  block.for_units(
      [&](int n, int j, int64_t unit) { step_cell_backward(params, block, d, n, unit, block.product(n, j)); });
}

template <class Tile, int kBatchTiles>
__global__ void __launch_bounds__(kThreads, 2) step_backward(const __grid_constant__ StepBackward params) {
  const int d = blockIdx.y;
  const LayerBackward& layer = params.pass.layer;
  StepBlock<Tile, kBatchTiles> block(params.part, layer.shape, layer.masks, layer.gates_map.packed_offset,
                                     layer.direction[d].reverse, params.s);
  if (params.part.product == Product::kRecurrent) {
    step_h_backward(params, block, d);
  } else {
    step_projection_backward(params, block, d);
  }
}

}  // namespace lstm_ext::cuda
