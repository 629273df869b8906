// One block of a team: its weights, its end of the exchange, and where each of its sequences stands. The walks of both
// passes (sequence_forward.cuh, sequence_backward.cuh) have one, and say what happens in a step:
//
//   for each batch of team_batch sequences that is this team's:
//     for each step:   find_moments   multiply   pointwise, by for_units   send
#pragma once

#include "pointwise.cuh"
#include "team.cuh"

namespace lstm_ext::cuda {

template <class Tile, int kBatchTiles>
class SequenceBlock {
 public:
  using Sum = typename Tile::Sum;
  // Registers hold the recurrent weights; what a projection has comes from shared memory in each step.
  using RecurrentWeights = OnChipWeights<Tile, kBatchTiles, Tile::kRegisterSteps>;
  using ProjectionWeights = OnChipWeights<Tile, kBatchTiles, 0>;

  __device__ SequenceBlock(const Layout& layout, const SequenceShape& shape, const Masks& masks, bool reverse,
                           const void* w_hh)
      : layout_(layout),
        shape_(shape),
        masks_(masks),
        reverse_(reverse),
        team_(layout),
        weights_(layout[Product::kRecurrent], w_hh, team_.rank(), team_.shared()) {}

  __device__ ProjectionWeights projection(const void* w_hr) const {
    return ProjectionWeights(layout_[Product::kProjection], w_hr, team_.rank(), team_.shared());
  }

  // Calls walk() for each batch of sequences that is this team's.
  template <class Walk>
  __device__ __forceinline__ void for_batches(const Walk& walk) {
    const int64_t each = layout_.team_batch;
    for (first_ = team_.team() * each; first_ < shape_.B; first_ += layout_.teams * each) {
      count_ = static_cast<int>(min(each, shape_.B - first_));
      walk();
      __syncthreads();  // the next walk writes what the last step may still be reading
    }
    team_.leave();
  }

  // Calls body(n, j, unit, index) for this rank's units of each sequence n, one thread each: unit j of its slice, and
  // `unit` of all. `index` counts both.
  template <class Body>
  __device__ __forceinline__ void for_units(const Slices& slices, const Body& body) const {
    const int width = slices.width;
    for (int index = threadIdx.x; index < count_ * width; index += kThreads) {
      const int j = index % width;
      const int64_t unit = static_cast<int64_t>(team_.rank()) * width + j;
      if (unit < slices.limit) body(index / width, j, unit, index);
    }
  }

  // Of this batch: how many sequences, and which of the layer's is its number n.
  __device__ int count() const { return count_; }
  __device__ int64_t sequence(int n) const { return first_ + n; }
  __device__ bool is_empty(int n) const { return length_of(masks_, shape_.T, first_ + n) == 0; }

  // Where the sequences stand at step s. Two sets take turns: while one step's is made, the last one's is still read.
  __device__ const Moment& moment(int64_t s, int n) const { return moments(s)[n]; }
  __device__ void find_moments(int64_t s) {
    const int n = threadIdx.x;
    if (n < count_) moments(s)[n] = moment_at(masks_, shape_.T, reverse_, s, first_ + n);
  }

  // c between the steps, or its gradient: of unit and sequence `index` of for_units.
  __device__ Sum& state(int index) const { return team_.state()[index]; }

  __device__ Team<Tile, kBatchTiles>& team() { return team_; }
  __device__ const RecurrentWeights& weights() const { return weights_; }

  // Waits for the operand of a product and multiplies this rank's weights with it.
  template <class Weights>
  __device__ __forceinline__ void multiply(Product which, const Weights& weights, bool sent) {
    team_.receive(which, count_, sent);
    weights.multiply(layout_[which], team_.operand(which), team_.partial(), layout_.partial_stride);
    __syncthreads();  // the sums of all warps are there, and nobody reads the operand any more
  }

  // The product's row j for sequence n.
  __device__ __forceinline__ Sum product(Product which, int n, int j) const {
    return total(team_.partial() + n * layout_.partial_stride + j, kWarps / layout_[which].warps_m,
                 kBatchTiles * kBatchColumns * layout_.partial_stride);
  }

  // This rank's part of the next operand of a product is put there: sends it to the others.
  __device__ __forceinline__ void send(Product which) { team_.send(which, count_); }

 private:
  __device__ Moment* moments(int64_t s) const {
    return reinterpret_cast<Moment*>(team_.shared() + layout_.moments_offset) + (s & 1) * kBatchTiles * kBatchColumns;
  }

  const Layout& layout_;
  const SequenceShape& shape_;
  const Masks& masks_;
  const bool reverse_;
  Team<Tile, kBatchTiles> team_;
  RecurrentWeights weights_;
  int64_t first_ = 0;  // sequence of this batch
  int count_ = 0;
};

}  // namespace lstm_ext::cuda
