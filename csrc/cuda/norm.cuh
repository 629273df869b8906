// A cell that normalises, between the products of its steps. A block has one sequence: its threads take the units by
// turns, and meet where a mean is taken. What a unit has to remember from one mean to the next its thread leaves in
// the row of sums, which nobody else reads.
//
//   step_sums    h W_hh' of all rows        ->  | norm_forward: moments | gates, c | moments of c | c', h |  ->  ..
//
// A mean is of the threads' sums, each over its units in their order, and those are added in an order that only H
// decides: the same bits in every run, whatever else is in the batch. A variance is the mean of squares of what has
// been centred.
#pragma once

#include <cmath>

#include "step.cuh"

namespace lstm_ext::cuda {

// What is normalised is (value - mean) * scale.
template <class Sum>
struct Moments {
  Sum mean, scale;

  __device__ __forceinline__ Sum normalised(Sum value) const { return (value - mean) * scale; }
};

// The row of a sequence in one direction: what both passes know of it.
template <class Tile>
class NormRow {
 public:
  using Number = typename Tile::Number;
  using Sum = typename Tile::Sum;
  using Four = Units<Sum, 4>;  // of the gates i f g o

  __device__ __forceinline__ NormRow(const KernelNorm& norm, bool tensorflow, const SequenceShape& shape, void* rows,
                                     int d, int64_t b)
      : norm_(norm),
        d_(d),
        b_(b),
        H_(shape.H),
        row_(static_cast<Sum*>(rows) + (d * shape.B + b) * 4 * shape.H),
        tensorflow_(tensorflow) {}

 protected:
  __device__ __forceinline__ bool by_rows() const { return norm_.kind == Norm::kRows; }

  template <class Body>
  __device__ __forceinline__ void for_units(const Body& body) const {
#pragma unroll 1
    for (int64_t u = threadIdx.x; u < H_; u += blockDim.x) body(u);
  }

  // Of N numbers that value(u) tells of each unit: their sums.
  template <int N, class Value>
  __device__ __forceinline__ Units<Sum, N> total(const Value& value) {
    Units<Sum, N> sums{};
    for_units([&](int64_t u) {
      const Units<Sum, N> values = value(u);
#pragma unroll
      for (int n = 0; n < N; ++n) sums.at[n] += values.at[n];
    });
    return total_of_threads(sums);
  }

  // Over what is normalised together, all four gates or each by itself.
  __device__ __forceinline__ Four means(const Four& totals) const {
    const auto [i, f, g, o] = totals.at;
    const Sum H = static_cast<Sum>(H_), all = (i + f + g + o) / (4 * H);
    return by_rows() ? Four{all, all, all, all} : Four{i / H, f / H, g / H, o / H};
  }

  // value(u): the four gates' sums.
  struct GateMoments {
    Moments<Sum> at[4];
  };
  template <class Value>
  __device__ __forceinline__ GateMoments moments_of_gates(const Value& value) {
    const Four mean = means(total<4>(value));
    const Four variance = means(total<4>([&](int64_t u) {
      Four squares = value(u);
#pragma unroll
      for (int n = 0; n < 4; ++n) squares.at[n] = (squares.at[n] - mean.at[n]) * (squares.at[n] - mean.at[n]);
      return squares;
    }));
    GateMoments moments;
#pragma unroll
    for (int n = 0; n < 4; ++n) moments.at[n] = {mean.at[n], scale_of(variance.at[n])};
    return moments;
  }

  // Of one number of each unit.
  __device__ __forceinline__ Moments<Sum> moments_of(const Sum* values) {
    const Sum H = static_cast<Sum>(H_);
    const Sum mean = total<1>([&](int64_t u) { return Units<Sum, 1>{{values[u]}}; }).at[0] / H;
    const Sum variance = total<1>([&](int64_t u) {
                           const Sum centred = values[u] - mean;
                           return Units<Sum, 1>{{centred * centred}};
                         }).at[0] /
                         H;
    return {mean, scale_of(variance)};
  }

  // Where gate n of a unit stands in the order of the weights.
  __device__ __forceinline__ int64_t place(int n, int64_t u) const {
    return (tensorflow_ && (n == 1 || n == 2) ? 3 - n : n) * H_ + u;
  }
  __device__ __forceinline__ Four gates_at(const Sum* row, int64_t u) const {
    return {row[place(0, u)], row[place(1, u)], row[place(2, u)], row[place(3, u)]};
  }

  // Of the sums of h, or of whole ones.
  __device__ __forceinline__ Sum gamma(int n, int64_t u) const {
    const Matrix& from = norm_.direction[d_].gamma;
    return weight(from.data, (by_rows() ? from.row_stride : 0) + n * H_ + u);
  }
  __device__ __forceinline__ Sum beta(int n, int64_t u) const { return weight(norm_.direction[d_].beta, n * H_ + u); }
  __device__ __forceinline__ Sum gamma_h(int64_t u) const { return weight(norm_.direction[d_].gamma_h, u); }
  // c as the output sees it.
  __device__ __forceinline__ Sum seen(Sum normed_c, int64_t u) const {
    return gamma_h(u) * normed_c + weight(norm_.direction[d_].beta_h, u);
  }

  const KernelNorm& norm_;
  const int d_;
  const int64_t b_, H_;
  Sum* const row_;  // [4H]

 private:
  static __device__ __forceinline__ Sum weight(const void* from, int64_t at) {
    return widen(static_cast<const Number*>(from)[at]);
  }

  __device__ __forceinline__ Sum scale_of(Sum variance) const {
    return 1 / std::sqrt(variance + static_cast<Sum>(norm_.epsilon));
  }

  // The same for all threads, in the same order. Two buffers take turns: who is still reading one is not in the way.
  template <int N>
  __device__ __forceinline__ Units<Sum, N> total_of_threads(Units<Sum, N> sums) {
    static_assert(N <= kMostRowSums);
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2)
#pragma unroll
      for (int n = 0; n < N; ++n) sums.at[n] += __shfl_xor_sync(~0u, sums.at[n], lanes);
    Sum* const of_warps = reinterpret_cast<Sum*>(dynamic_shared()) + turn_ * kMostRowWarps * kMostRowSums;
    turn_ ^= 1;
    const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int n = 0; n < N; ++n) of_warps[warp * N + n] = sums.at[n];
    }
    __syncthreads();  // the sums of all warps are there
    Units<Sum, N> total{};
#pragma unroll 1
    for (int w = 0; w < warps; ++w)
#pragma unroll
      for (int n = 0; n < N; ++n) total.at[n] += of_warps[w * N + n];
    return total;
  }

  const bool tensorflow_;
  int turn_ = 0;
};

}  // namespace lstm_ext::cuda
