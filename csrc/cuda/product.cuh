// The product of a step: a rank's rows of the weights, kept on chip, times the operand that all ranks have.
//
//   sums[m, n] = sum over k of weights[m, k] operand[k, n]      m: rows of this rank, n: up to 8, 16 or 32 sequences
//
// A warp takes one step after the other: the weights of a step are kRowTiles tiles of rows times one tile of k, and all
// batch tiles of the operand are multiplied with them. It has the sums of its pair of row tiles in registers, and when
// the last of its k tiles is done it stores them to `partial`. Warps side by side along k split it:
//
//                        k tiles of split 0   of split 1                      partial [split, n, m]
//   pair 0 (warps_m = 2)   warp 0               warp 2         x  operand  ->   0: warp 0   1: warp 2
//   pair 1                 warp 1               warp 3            [k, n]           warp 1      warp 3
//   pair 2                 warp 0               warp 2                             warp 0      warp 2
//
// The pointwise part then adds the splits up, always in the same order (`total`).
//
// Registers of a thread: 16 steps x 2 tiles x 4 words of weights (float32, float64: 1 tile), which is half of all that
// there are, and 4 sums for each row tile and batch tile (8 in the plain tiles).
#pragma once

#include "layout.h"
#include "tile.cuh"

namespace lstm_ext::cuda {

// The steps of one warp: pairs of row tiles first_pair, first_pair + warps_m, ..., of each the k tiles from
// first_k_tile on. Registers hold it all the time, so it has nothing that the layout has.
struct WarpShare {
  int split;  // which part of k
  int first_k_tile, k_tiles;
  int steps;

  static __device__ __forceinline__ int first_pair(const ProductLayout& product) {
    return static_cast<int>(threadIdx.x / 32) & (product.warps_m - 1);  // which is a power of two
  }

  template <class Tile>
  static __device__ WarpShare of(const ProductLayout& product) {
    const int warp = threadIdx.x / 32, splits = kWarps / product.warps_m;
    const int pairs = (product.row_tiles + Tile::kRowTiles - 1) / Tile::kRowTiles;
    const int each = (product.k_tiles + splits - 1) / splits;
    WarpShare share;
    share.split = warp / product.warps_m;
    share.first_k_tile = share.split * each;
    share.k_tiles = max(0, min(each, product.k_tiles - share.first_k_tile));
    const int own_pairs = (pairs - first_pair(product) + product.warps_m - 1) / product.warps_m;
    share.steps = own_pairs * share.k_tiles;
    return share;
  }
};

// A lane's 16 bytes of a tile of the weights of one rank, as they lie in global memory; zeros outside them, so that
// what meets them there counts nothing. Not inlined: it runs once for each tile, and is large.
template <class Tile>
__device__ __noinline__ uint4 fetch_tile(const ProductLayout& product, const void* weights, int rank, int row_tile,
                                         int k_tile) {
  struct Numbers {
    typename Tile::OnChip at[16 / sizeof(typename Tile::OnChip)];
  } numbers;
  const auto* data = static_cast<const typename Tile::Number*>(weights);
  const int lane = threadIdx.x % 32, rows = product.rows.per_rank();
#pragma unroll
  for (int n = 0; n < static_cast<int>(sizeof(numbers) / sizeof(numbers.at[0])); ++n) {
    const int row = row_tile * Tile::kM + Tile::row(lane, n), column = k_tile * Tile::kK + Tile::column(lane, n);
    const int64_t i = row < rows ? product.rows.index_of(rank * rows + row) : -1;
    const int64_t j = product.columns.index_of(column);
    numbers.at[n] =
        i < 0 || j < 0 ? Tile::on_chip(0) : Tile::keep(data[i * product.row_stride + j * product.column_stride]);
  }
  return bits_as<uint4>(numbers);
}

// The sums of a warp over one pair of row tiles and all batch tiles.
template <class Tile, int kBatchTiles>
struct Sums {
  typename Tile::Sum at[kBatchTiles][Tile::kRowTiles][Tile::kSums];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int t = 0; t < kBatchTiles; ++t)
#pragma unroll
      for (int m = 0; m < Tile::kRowTiles; ++m)
#pragma unroll
        for (int n = 0; n < Tile::kSums; ++n) at[t][m][n] = 0;
  }

  // `operand` is that of the first batch tile.
  __device__ __forceinline__ void add(const uint4 (&weights)[Tile::kRowTiles], const typename Tile::OnChip* operand,
                                      int lane) {
#pragma unroll
    for (int t = 0; t < kBatchTiles; ++t) Tile::multiply(at[t], weights, operand + t * Tile::kK * kBatchColumns, lane);
  }

  // Into partial [sequences, stride], rows of a tile pair starting at `row`. The stride leaves no two lanes on a bank.
  __device__ __forceinline__ void store(typename Tile::Sum* partial, int stride, int row, int rows, int lane) const {
#pragma unroll
    for (int m = 0; m < Tile::kRowTiles; ++m) {
      if (row + m * Tile::kM >= rows) break;  // the pair's second tile may not be there
#pragma unroll
      for (int t = 0; t < kBatchTiles; ++t)
#pragma unroll
        for (int n = 0; n < Tile::kSums; ++n) {
          const int column = t * kBatchColumns + Tile::sum_column(lane, n);
          partial[column * stride + row + m * Tile::kM + Tile::sum_row(lane, n)] = at[t][m][n];
        }
    }
  }
};

// The weights of one product on chip: each warp's first kRegisterSteps steps in registers, the rest in shared memory.
template <class Tile, int kBatchTiles, int kRegisterSteps>
class OnChipWeights {
 public:
  __device__ OnChipWeights(const ProductLayout& product, const void* weights, int rank, char* shared)
      : share_(WarpShare::of<Tile>(product)),
        shared_(reinterpret_cast<uint4*>(shared + product.tiles_offset) +
                threadIdx.x / 32 * product.shared_steps * Tile::kRowTiles * 32) {
    const auto fetch = [&](int row_tile, int k_tile) {
      return fetch_tile<Tile>(product, weights, rank, row_tile, share_.first_k_tile + k_tile);
    };
    const int lane = threadIdx.x % 32;
    int pair = WarpShare::first_pair(product), k_tile = 0;
    // Unrolled, as an array whose index is not a constant would not stay in registers.
#pragma unroll
    for (int step = 0; step < kRegisterSteps; ++step) {
#pragma unroll
      for (int m = 0; m < Tile::kRowTiles; ++m) registers_[step][m] = {};
      if (step >= share_.steps) continue;
#pragma unroll
      for (int m = 0; m < Tile::kRowTiles; ++m) registers_[step][m] = fetch(pair * Tile::kRowTiles + m, k_tile);
      advance(product, pair, k_tile);
    }
    for (int step = kRegisterSteps; step < share_.steps; ++step) {
      for (int m = 0; m < Tile::kRowTiles; ++m)
        shared_[((step - kRegisterSteps) * Tile::kRowTiles + m) * 32 + lane] =
            fetch(pair * Tile::kRowTiles + m, k_tile);
      advance(product, pair, k_tile);
    }
  }

  // Each warp writes its sums to partial [split, sequences, stride]; every sum there is written, and by the warps of
  // a split without k tiles it is zero.
  __device__ __forceinline__ void multiply(const ProductLayout& product, const typename Tile::OnChip* operand,
                                           typename Tile::Sum* partial, int stride) const {
    const int lane = threadIdx.x % 32, rows = product.row_tiles * Tile::kM;
    partial += share_.split * kBatchTiles * kBatchColumns * stride;
    Sums<Tile, kBatchTiles> sums;
    sums.clear();
    if (share_.k_tiles == 0) return store_zeros(product, sums, partial, stride);
    constexpr int kOperandTile = kBatchTiles * Tile::kK * kBatchColumns;
    const typename Tile::OnChip* first = operand + share_.first_k_tile * kOperandTile;
    int pair = WarpShare::first_pair(product), k_tile = 0;
    const auto take = [&](const uint4(&weights)[Tile::kRowTiles]) {
      sums.add(weights, first + k_tile * kOperandTile, lane);
      if (k_tile == share_.k_tiles - 1) {
        sums.store(partial, stride, pair * Tile::kRowTiles * Tile::kM, rows, lane);
        sums.clear();
      }
      advance(product, pair, k_tile);
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
  // From one step to the next: along k first.
  __device__ __forceinline__ void advance(const ProductLayout& product, int& pair, int& k_tile) const {
    if (++k_tile == share_.k_tiles) {
      k_tile = 0;
      pair += product.warps_m;
    }
  }

  __device__ void store_zeros(const ProductLayout& product, const Sums<Tile, kBatchTiles>& zeros,
                              typename Tile::Sum* partial, int stride) const {
    constexpr int kPairRows = Tile::kRowTiles * Tile::kM;
    const int rows = product.row_tiles * Tile::kM;
    for (int row = WarpShare::first_pair(product) * kPairRows; row < rows; row += product.warps_m * kPairRows)
      zeros.store(partial, stride, row, rows, threadIdx.x % 32);
  }

  WarpShare share_;
  uint4* shared_;
  uint4 registers_[kRegisterSteps > 0 ? kRegisterSteps : 1][Tile::kRowTiles];
};

// The sum over the splits of one row and sequence, in a fixed order: results do not depend on which warp was first.
template <class Sum>
__device__ __forceinline__ Sum total(const Sum* partial, int splits, int split_stride) {
  Sum sum = partial[0];
  for (int split = 1; split < splits; ++split) sum += partial[split * split_stride];
  return sum;
}

}  // namespace lstm_ext::cuda
