// A cell that normalises, between the products of its steps. A block has one sequence: its threads take the units by
// turns, and meet where a mean is taken.
//
//   step_sums    h W_hh' of all rows        ->  | norm_forward: moments | gates, c | moments of c | c', h |  ->  ..
//
// What a unit has to remember from one mean to the next are four numbers. Where no thread has more than one unit, in
// rows up to 512, of doubles 256, it has them in registers, with all that it has read of the unit; in longer rows they
// are in shared memory, or where that is too small in the row of sums, which nobody else reads.
//
// A mean is of the threads' sums, each over its units in their order, and those are added in an order that only H
// decides: the same bits in every run, whatever else is in the batch. A variance is the mean of squares of what has
// been centred.
#pragma once

#include <type_traits>

#include "normed.cuh"
#include "step.cuh"

namespace lstm_ext::cuda {

// The row of a sequence in one direction: what both passes know of it. kOne: no thread has more than one unit.
template <class Tile, bool kOne>
class NormRow : public Normed<Tile> {
  using Base = Normed<Tile>;

 public:
  using typename Base::Number, typename Base::Sum, typename Base::Four;

  __device__ __forceinline__ NormRow(const KernelNorm& norm, bool tensorflow, const SequenceShape& shape, void* rows,
                                     int d, int64_t b)
      : Base(norm, d, shape.H),
        b_(b),
        row_(static_cast<Sum*>(rows) + (d * shape.B + b) * 4 * shape.H),
        tensorflow_(tensorflow),
        memory_(norm.in_shared ? reinterpret_cast<Sum*>(dynamic_shared() + row_sums_bytes(sizeof(Sum))) : row_) {}

 protected:
  using Base::H_;

  template <class Body>
  __device__ __forceinline__ void for_units(const Body& body) const {
    if constexpr (kOne) {
      if (threadIdx.x < H_) body(int64_t{threadIdx.x});
    } else {
#pragma unroll 1
      for (int64_t u = threadIdx.x; u < H_; u += blockDim.x) body(u);
    }
  }

  // What a thread keeps of its one unit, or of any unit what load() reads anew.
  template <class T, class Load>
  static __device__ __forceinline__ T kept_or(const T& kept, const Load& load) {
    if constexpr (kOne) {
      return kept;
    } else {
      return load();
    }
  }

  // What units remember becomes make(u); body(u, it) reads it, or changes it.
  template <class Make>
  __device__ __forceinline__ void make_units(const Make& make) {
    for_units([&](int64_t u) { remember(u, make(u)); });
  }
  template <class Body>
  __device__ __forceinline__ void read_units(const Body& body) const {
    for_units([&](int64_t u) { body(u, remembered(u)); });
  }
  template <class Body>
  __device__ __forceinline__ void change_units(const Body& body) {
    for_units([&](int64_t u) {
      Four unit = remembered(u);
      body(u, unit);
      remember(u, unit);
    });
  }

  // Of N numbers that value(u, what it remembers) tells of each unit: their sums. `value` may change what it remembers.
  template <int N, class Value>
  __device__ __forceinline__ Units<Sum, N> total(const Value& value) {
    Units<Sum, N> sums{};
    const auto add = [&](int64_t u, auto&& unit) {
      const Units<Sum, N> values = value(u, unit);
#pragma unroll
      for (int n = 0; n < N; ++n) sums.at[n] += values.at[n];
    };
    if constexpr (std::is_invocable_v<Value, int64_t, const Four&>) {
      read_units(add);
    } else {
      change_units(add);
    }
    return total_of_threads(sums);
  }

  // Of the four numbers that units remember, as the gates' sums.
  __device__ __forceinline__ Units<Moments<Sum>, 4> moments_of_gates() {
    const Sum part = 1 / static_cast<Sum>(H_);
    const Four mean = this->means(total<4>([](int64_t, const Four& sums) { return sums; }), part);
    const Four variance = this->means(total<4>([&](int64_t, const Four& sums) {
                                        Four squares;
#pragma unroll
                                        for (int n = 0; n < 4; ++n)
                                          squares.at[n] = (sums.at[n] - mean.at[n]) * (sums.at[n] - mean.at[n]);
                                        return squares;
                                      }),
                                      part);
    return this->moments(mean, variance);
  }

  // Of one of these numbers.
  template <int n>
  __device__ __forceinline__ Moments<Sum> moments_of() {
    const Sum H = static_cast<Sum>(H_);
    const Sum mean = total<1>([&](int64_t, const Four& unit) { return Units<Sum, 1>{{unit.at[n]}}; }).at[0] / H;
    const Sum variance = total<1>([&](int64_t, const Four& unit) {
                           const Sum centred = unit.at[n] - mean;
                           return Units<Sum, 1>{{centred * centred}};
                         }).at[0] /
                         H;
    return this->moments(mean, variance);
  }

  // Where gate n of a unit stands in the order of the weights.
  __device__ __forceinline__ int64_t place(int n, int64_t u) const {
    return (tensorflow_ && (n == 1 || n == 2) ? 3 - n : n) * H_ + u;
  }
  __device__ __forceinline__ Four gates_at(const Sum* row, int64_t u) const {
    return {row[place(0, u)], row[place(1, u)], row[place(2, u)], row[place(3, u)]};
  }

  const int64_t b_;
  Sum* const row_;  // [4H]

 private:
  __device__ __forceinline__ Four remembered(int64_t u) const {
    if constexpr (kOne) {
      return unit_;
    } else {
      return gates_at(memory_, u);
    }
  }
  __device__ __forceinline__ void remember(int64_t u, const Four& unit) {
    if constexpr (kOne) {
      unit_ = unit;
    } else {
#pragma unroll
      for (int n = 0; n < 4; ++n) memory_[place(n, u)] = unit.at[n];
    }
  }

  static __device__ __forceinline__ Sum* sums_of_warps() { return reinterpret_cast<Sum*>(dynamic_shared()); }

  // Of N numbers of each lane, where N is a power of two: lane l gets the warp's sum of number l / (32 / N). The
  // numbers are divided among the lanes, half of them at a time, which takes fewer shuffles than each number by itself.
  template <int N>
  static __device__ __forceinline__ Sum total_of_warp(Units<Sum, N> sums) {
    const int lane = threadIdx.x % 32;
    int apart = 16;
#pragma unroll
    for (int half = N / 2; half > 0; half /= 2, apart /= 2) {
      const bool upper = lane & apart;
#pragma unroll
      for (int n = 0; n < half; ++n) {
        const Sum other = upper ? sums.at[n] : sums.at[half + n], own = upper ? sums.at[half + n] : sums.at[n];
        sums.at[n] = own + __shfl_xor_sync(~0u, other, apart);
      }
    }
    return total_of_lanes<32 / N>(sums.at[0]);
  }
  // The same for all threads, in the same order. Two buffers take turns: who is still reading one is not in the way.
  template <int N>
  __device__ __forceinline__ Units<Sum, N> total_of_threads(const Units<Sum, N>& sums) {
    static_assert(N <= kMostRowSums);
    constexpr int kLanes = 32 / N;  // of each number
    Sum* const of_warps = sums_of_warps() + turn_ * kMostRowWarps * kMostRowSums;
    turn_ ^= 1;
    const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;
    const int number = static_cast<int>(threadIdx.x) % 32 / kLanes, lane = static_cast<int>(threadIdx.x) % kLanes;
    const Sum of_warp = total_of_warp(sums);
    if (lane == 0) of_warps[warp * N + number] = of_warp;
    __syncthreads();  // the sums of all warps are there
    Sum sum = 0;
#pragma unroll
    for (int w = 0; w < kMostRowWarps; w += kLanes)
      if (w + lane < warps) sum += of_warps[(w + lane) * N + number];
    sum = total_of_lanes<kLanes>(sum);
    Units<Sum, N> total;
#pragma unroll
    for (int n = 0; n < N; ++n) total.at[n] = N == 1 ? sum : __shfl_sync(~0u, sum, n * kLanes);
    return total;
  }

  const bool tensorflow_;
  Sum* const memory_;  // of what units remember
  Four unit_;          // kOne: that of the thread's
  int turn_ = 0;
};

// A block takes its row. What the constructor reads no launch of the layer writes: it stands before the wait.
template <template <class, bool> class Row, class Tile, class Params>
__device__ __forceinline__ void take_row(const Params& params, int64_t H) {
  const auto take = [&](auto one) {
    Row<Tile, one> row(params, blockIdx.y, blockIdx.x);
    wait_for_previous_launch();
    let_next_launch_start();
    row.take();
  };
  if (H <= blockDim.x) {
    take(std::true_type());
  } else {
    take(std::false_type());
  }
}

}  // namespace lstm_ext::cuda
