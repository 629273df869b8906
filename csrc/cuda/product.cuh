// The product of a step: a rank's rows of the weights, kept on chip, times the operand that all ranks have.
#pragma once

#include "tile.cuh"

namespace lstm_ext::cuda {

// The part of a stage's tiles that is one warp's: pairs of row tiles first_pair, first_pair + warps_m, ..., of each the
// column tiles from first_column on. A step takes one column tile of one pair. Registers hold it through all steps, so
// it has nothing that the stage has.
struct WarpShare {
  int slice;  // which part of the columns
  int first_column, columns;
  int steps;

  static __device__ __forceinline__ int first_pair(const Stage& stage) {
    return static_cast<int>(threadIdx.x / 32) & (stage.warps_m - 1);  // which is a power of two
  }

  template <class Tile>
  static __device__ WarpShare of(const Stage& stage) {
    const int warp = threadIdx.x / 32, slices = kWarps / stage.warps_m;
    const int pairs = (stage.row_tiles + Tile::kRowTiles - 1) / Tile::kRowTiles;
    const int each = (stage.column_tiles + slices - 1) / slices;
    WarpShare share;
    share.slice = warp / stage.warps_m;
    share.first_column = share.slice * each;
    share.columns = max(0, min(each, stage.column_tiles - share.first_column));
    const int own_pairs = (pairs - first_pair(stage) + stage.warps_m - 1) / stage.warps_m;
    share.steps = own_pairs * share.columns;
    return share;
  }
};

// A lane's 16 bytes of a tile of the weights of one rank, as they lie in global memory; zeros outside them, so that
// what meets them there counts nothing. Not inlined: it runs once for each tile, and is large.
template <class Tile>
__device__ __noinline__ uint4 fetch_tile(const Stage& stage, const void* weights, int rank, int row_tile,
                                         int column_tile) {
  struct Numbers {
    typename Tile::OnChip at[16 / sizeof(typename Tile::OnChip)];
  } numbers;
  const auto* data = static_cast<const typename Tile::Number*>(weights);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < static_cast<int>(sizeof(numbers) / sizeof(numbers.at[0])); ++n) {
    const int row = row_tile * Tile::kM + Tile::row(lane, n), column = column_tile * Tile::kK + Tile::column(lane, n);
    const int64_t i = row < stage.rows.each() ? stage.rows.place(rank * stage.rows.each() + row) : -1;
    const int64_t j = stage.columns.place(column);
    numbers.at[n] =
        i < 0 || j < 0 ? Tile::on_chip(0) : Tile::keep(data[i * stage.row_stride + j * stage.column_stride]);
  }
  return bits_as<uint4>(numbers);
}

// The sums of a warp over one pair of row tiles and all column tiles of the batch.
template <class Tile, int kTiles>
struct Sums {
  typename Tile::Sum at[kTiles][Tile::kRowTiles][Tile::kSums];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int m = 0; m < Tile::kRowTiles; ++m)
#pragma unroll
        for (int n = 0; n < Tile::kSums; ++n) at[t][m][n] = 0;
  }

  // `operand` is that of the first column tile of the batch.
  __device__ __forceinline__ void add(const uint4 (&weights)[Tile::kRowTiles], const typename Tile::OnChip* operand,
                                      int lane) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) Tile::multiply(at[t], weights, operand + t * Tile::kK * kColumns, lane);
  }

  // Into partial [batch tile, stride], rows of a tile pair starting at `row`. The stride leaves no two lanes on a bank.
  __device__ __forceinline__ void store(typename Tile::Sum* partial, int stride, int row, int rows, int lane) const {
#pragma unroll
    for (int m = 0; m < Tile::kRowTiles; ++m) {
      if (row + m * Tile::kM >= rows) break;  // the pair's second tile may not be there
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int n = 0; n < Tile::kSums; ++n) {
          const int column = t * kColumns + Tile::sum_column(lane, n);
          partial[column * stride + row + m * Tile::kM + Tile::sum_row(lane, n)] = at[t][m][n];
        }
    }
  }
};

// The weights of one stage on chip: each warp's first kRegisterSteps steps in registers, the rest in shared memory.
template <class Tile, int kTiles, int kRegisterSteps>
class OnChipWeights {
 public:
  __device__ OnChipWeights(const Stage& stage, const void* weights, int rank, char* shared)
      : share_(WarpShare::of<Tile>(stage)),
        shared_(reinterpret_cast<uint4*>(shared + stage.tiles_offset) +
                threadIdx.x / 32 * stage.shared_steps * Tile::kRowTiles * 32) {
    const auto fetch = [&](int row_tile, int column_tile) {
      return fetch_tile<Tile>(stage, weights, rank, row_tile, share_.first_column + column_tile);
    };
    const int lane = threadIdx.x % 32;
    int pair = WarpShare::first_pair(stage), column = 0;
#pragma unroll
    for (int step = 0; step < kRegisterSteps; ++step) {
#pragma unroll
      for (int m = 0; m < Tile::kRowTiles; ++m) registers_[step][m] = {};
      if (step >= share_.steps) continue;
#pragma unroll
      for (int m = 0; m < Tile::kRowTiles; ++m) registers_[step][m] = fetch(pair * Tile::kRowTiles + m, column);
      advance(stage, pair, column);
    }
    for (int step = kRegisterSteps; step < share_.steps; ++step) {
      for (int m = 0; m < Tile::kRowTiles; ++m)
        shared_[((step - kRegisterSteps) * Tile::kRowTiles + m) * 32 + lane] =
            fetch(pair * Tile::kRowTiles + m, column);
      advance(stage, pair, column);
    }
  }

  // Each warp writes its sums to partial [slice, batch tile, stride]; every sum there is written but for the slices
  // without columns, which write zeros.
  __device__ __forceinline__ void multiply(const Stage& stage, const typename Tile::OnChip* operand,
                                           typename Tile::Sum* partial, int stride) const {
    const int lane = threadIdx.x % 32, rows = stage.row_tiles * Tile::kM;
    partial += share_.slice * kTiles * kColumns * stride;
    Sums<Tile, kTiles> sums;
    sums.clear();
    if (share_.columns == 0) return store_zeros(stage, sums, partial, stride);
    constexpr int kOperandTile = kTiles * Tile::kK * kColumns;
    const typename Tile::OnChip* first = operand + share_.first_column * kOperandTile;
    int pair = WarpShare::first_pair(stage), column = 0;
    const auto take = [&](const uint4(&weights)[Tile::kRowTiles]) {
      sums.add(weights, first + column * kOperandTile, lane);
      if (column == share_.columns - 1) {
        sums.store(partial, stride, pair * Tile::kRowTiles * Tile::kM, rows, lane);
        sums.clear();
      }
      advance(stage, pair, column);
    };
#pragma unroll
    for (int step = 0; step < kRegisterSteps; ++step) {
      if (step < share_.steps) take(registers_[step]);
    }
    for (int step = kRegisterSteps; step < share_.steps; ++step) {
      uint4 weights[Tile::kRowTiles];
#pragma unroll
      for (int m = 0; m < Tile::kRowTiles; ++m)
        weights[m] = shared_[((step - kRegisterSteps) * Tile::kRowTiles + m) * 32 + lane];
      take(weights);
    }
  }

 private:
  __device__ __forceinline__ void advance(const Stage& stage, int& pair, int& column) const {
    if (++column == share_.columns) {
      column = 0;
      pair += stage.warps_m;
    }
  }

  __device__ void store_zeros(const Stage& stage, const Sums<Tile, kTiles>& zeros, typename Tile::Sum* partial,
                              int stride) const {
    constexpr int kPairRows = Tile::kRowTiles * Tile::kM;
    const int rows = stage.row_tiles * Tile::kM;
    for (int row = WarpShare::first_pair(stage) * kPairRows; row < rows; row += stage.warps_m * kPairRows)
      zeros.store(partial, stride, row, rows, threadIdx.x % 32);
  }

  WarpShare share_;
  uint4* shared_;
  uint4 registers_[kRegisterSteps > 0 ? kRegisterSteps : 1][Tile::kRowTiles];
};

// The sum over the slices of one row and column, in a fixed order.
template <class Sum>
__device__ __forceinline__ Sum total(const Sum* partial, int slices, int slice_stride) {
  Sum sum = partial[0];
  for (int slice = 1; slice < slices; ++slice) sum += partial[slice * slice_stride];
  return sum;
}

}  // namespace lstm_ext::cuda
