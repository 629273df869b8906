// What the blocks of both passes have: a team, its tile of the batch, and where each of its sequences stands.
#pragma once

#include "team.cuh"
#include "unit.cuh"

namespace lstm_ext::cuda {

template <class Tile, int kTiles>
class SequenceBlock {
 protected:
  using Sum = typename Tile::Sum;
  using Number = typename Tile::Number;
  using SecondWeights = OnChipWeights<Tile, kTiles, 0>;
  static constexpr int kBatchTile = kTiles * kColumns;

  __device__ SequenceBlock(const Spread& spread, const SequenceShape& shape, const Masks& masks, bool reverse,
                           const void* first_weights)
      : spread_(spread),
        shape_(shape),
        masks_(masks),
        reverse_(reverse),
        team_(spread),
        weights_(spread.stage[0], first_weights, team_.rank(), team_.shared()) {}

  // Calls walk() for each tile of the batch that is this team's.
  template <class Walk>
  __device__ __forceinline__ void for_batch_tiles(const Walk& walk) {
    const int64_t tile = spread_.batch_tile;
    for (first_ = team_.team() * tile; first_ < shape_.B; first_ += spread_.teams * tile) {
      count_ = static_cast<int>(min(tile, shape_.B - first_));
      walk();
      __syncthreads();  // the next walk writes what the last step may still be reading
    }
    team_.leave();
  }

  // Calls body(n, j, unit, index) for this rank's units of each sequence n, one thread each: unit j of its share, and
  // `unit` of all. `index` counts both.
  template <class Body>
  __device__ __forceinline__ void for_units(const SharedOut& out, const Body& body) const {
    const int width = out.width;
    for (int index = threadIdx.x; index < count_ * width; index += kThreads) {
      const int j = index % width;
      const int64_t unit = static_cast<int64_t>(team_.rank()) * width + j;
      if (unit < out.limit) body(index / width, j, unit, index);
    }
  }

  // Where the sequences stand at step s. Two sets take turns: while one step's is made, the last one's is still read.
  __device__ const Row& row(int64_t s, int n) const { return rows(s)[n]; }
  __device__ void find_rows(int64_t s) {
    const int n = threadIdx.x;
    if (n < count_) rows(s)[n] = row_at(masks_, shape_.T, reverse_, s, first_ + n);
  }
  __device__ bool is_empty(int n) const { return length_of(masks_, shape_.T, first_ + n) == 0; }

  // Waits for the operand of a stage and multiplies this rank's weights with it.
  template <class Weights>
  __device__ __forceinline__ void multiply(int stage, const Weights& weights, bool sent) {
    team_.receive(stage, count_, sent);
    weights.multiply(spread_.stage[stage], team_.operand(stage), team_.partial(), spread_.partial_stride);
    __syncthreads();  // the sums of all warps are there, and nobody reads the operand any more
  }

  // The product's row j for sequence n.
  __device__ __forceinline__ Sum product(int stage, int n, int j) const {
    return total(team_.partial() + n * spread_.partial_stride + j, kWarps / spread_.stage[stage].warps_m,
                 kBatchTile * spread_.partial_stride);
  }

  const Spread& spread_;
  const SequenceShape& shape_;
  const Masks& masks_;
  const bool reverse_;
  Team<Tile, kTiles> team_;
  OnChipWeights<Tile, kTiles, Tile::kRegisterSteps> weights_;  // of stage 0
  int64_t first_ = 0;                                          // sequence of this tile of the batch
  int count_ = 0;

 private:
  __device__ Row* rows(int64_t s) const {
    return reinterpret_cast<Row*>(team_.shared() + spread_.rows_offset) + (s & 1) * kBatchTile;
  }
};

}  // namespace lstm_ext::cuda
