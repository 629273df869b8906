// What is normalised, of a row at a time: by moments of what all its units have, and by weights of its own.
//
// In a launch for the rows of one step a block has a row (norm.cuh). In a launch for all T a warp of each rank has the
// row of a sequence, as far as its units go: `TeamRow` finds the moments of the whole.
#pragma once

#include "team.cuh"

namespace lstm_ext::cuda {

// What is normalised is (value - mean) * scale.
template <class Sum>
struct Moments {
  Sum mean, scale;

  __device__ __forceinline__ Sum normalised(Sum value) const { return (value - mean) * scale; }
};

// Of the sums in groups of so many adjacent lanes.
template <int kLanes, class Sum>
__device__ __forceinline__ Sum total_of_lanes(Sum sum) {
#pragma unroll
  for (int apart = kLanes / 2; apart > 0; apart /= 2) sum += __shfl_xor_sync(~0u, sum, apart);
  return sum;
}

// The gates of a unit as numbers one after the other, and the way back.
template <class Sum>
__device__ __forceinline__ Units<Sum, 4> four_of(const GateValues<Sum>& gates) {
  return {gates.i, gates.f, gates.g, gates.o};
}
template <class Sum>
__device__ __forceinline__ GateValues<Sum> gates_of(const Units<Sum, 4>& four) {
  return {four.at[0], four.at[1], four.at[2], four.at[3]};
}

// What a layer knows of it, in one direction.
template <class Tile>
class Normed {
 public:
  using Number = typename Tile::Number;
  using Sum = typename Tile::Sum;
  using Four = Units<Sum, 4>;  // of the gates i f g o

  __device__ __forceinline__ Normed(const KernelNorm& norm, int d, int64_t H) : norm_(norm), d_(d), H_(H) {}

  // Over what is normalised together, all four gates or each by itself: from sums of units, each of which is so large a
  // part of them.
  __device__ __forceinline__ bool by_rows() const { return norm_.kind == Norm::kRows; }
  __device__ __forceinline__ Four means(const Four& sums, Sum part) const {
    const auto [i, f, g, o] = sums.at;
    const Sum all = (i + f + g + o) * (part / 4);
    return by_rows() ? Four{all, all, all, all} : Four{i * part, f * part, g * part, o * part};
  }
  __device__ __forceinline__ Moments<Sum> moments(Sum mean, Sum variance) const {
    return {mean, rsqrt(variance + static_cast<Sum>(norm_.epsilon))};
  }
  __device__ __forceinline__ Units<Moments<Sum>, 4> moments(const Four& mean, const Four& variance) const {
    Units<Moments<Sum>, 4> result;
#pragma unroll
    for (int n = 0; n < 4; ++n) result.at[n] = moments(mean.at[n], variance.at[n]);
    return result;
  }

  // What scales and shifts a unit: gamma of the sums of h, or of whole ones, and c as the output sees it.
  struct Scales {
    Four gamma;
    Sum gamma_h, beta_h;

    __device__ __forceinline__ Sum seen(Sum normed_c) const { return gamma_h * normed_c + beta_h; }
  };
  __device__ __forceinline__ Scales scales(int64_t u) const {
    const auto& from = norm_.direction[d_];
    const int64_t gamma = (by_rows() ? from.gamma.row_stride : 0) + u;
    const void* data = from.gamma.data;
    return {{weight(data, gamma), weight(data, gamma + H_), weight(data, gamma + 2 * H_), weight(data, gamma + 3 * H_)},
            weight(from.gamma_h, u),
            weight(from.beta_h, u)};
  }
  // Of whole sums; zero of those of h.
  __device__ __forceinline__ Four beta(int64_t u) const {
    if (by_rows()) return {};
    const void* data = norm_.direction[d_].beta;
    return {weight(data, u), weight(data, u + H_), weight(data, u + 2 * H_), weight(data, u + 3 * H_)};
  }
  struct Unit {
    Scales scales;
    Four beta;
  };
  __device__ __forceinline__ Unit unit(int64_t u) const { return {scales(u), beta(u)}; }

 protected:
  const KernelNorm& norm_;
  const int d_;
  const int64_t H_;

 private:
  static __device__ __forceinline__ Sum weight(const void* from, int64_t at) {
    return widen(static_cast<const Number*>(from)[at]);
  }
};

// Of one number of each unit.
struct MeanOfUnits {
  template <class Sum>
  __device__ __forceinline__ Units<Sum, 1> operator()(const Units<Sum, 1>& sum, Sum part) const {
    return {{sum.at[0] * part}};
  }
};

// The row of sequence n, of which a warp of each rank has the units of that rank, as lanes of it. All ranks find the
// same moments, bit by bit, in an order that only the layer's size and the team's decide.
template <class Sum, class Team>
class TeamRow {
 public:
  // `rows` sequences have a row.
  __device__ __forceinline__ TeamRow(Team& team, const Share& units, int n, int rows)
      : team_(team), units_(units), n_(n), rows_(rows) {}

  // Of N numbers of each unit, of which this lane has the sums: what this rank has, which all others are sent.
  // squares(means) are the lane's sums of squares of what has been centred; means(sums, part) are as those of
  // Normed.
  template <int N>
  struct Part {
    Sum units;
    Units<Sum, N> sums, squares;
  };
  template <int N, class Means, class Squares>
  __device__ __forceinline__ Part<N> own_part(const Units<Sum, N>& of_lane, const Means& means,
                                              const Squares& squares) {
    Part<N> own{units_of(team_.rank()), total(of_lane), {}};
    own.squares = total(squares(means(own.sums, part_of(own.units))));
    if (team_.alone()) return own;
    typename Team::RowNumbers numbers{};
#pragma unroll
    for (int i = 0; i < N; ++i) {
      numbers.at[i] = own.sums.at[i];
      numbers.at[N + i] = own.squares.at[i];
    }
    team_.send_row(n_, rows_, numbers);
    return own;
  }

  // The means and variances over all ranks, each of which has squares about its own mean. About that of all they are
  // larger by the squared distance of both, for each unit: no two large numbers are subtracted.
  template <int N>
  struct Statistics {
    Units<Sum, N> mean, variance;
  };
  template <int N, class Means>
  __device__ __forceinline__ Statistics<N> statistics(Part<N> part, const Means& means) const {
    const auto add_distance = [&](Sum weight, const Units<Sum, N>& a, const Units<Sum, N>& b) {
#pragma unroll
      for (int i = 0; i < N; ++i) part.squares.at[i] += weight * (a.at[i] - b.at[i]) * (a.at[i] - b.at[i]);
    };
    const Sum of_all = part_of(static_cast<Sum>(units_.limit));
    if (team_.alone()) return {means(part.sums, of_all), means(part.squares, of_all)};
    part = {};  // of the ranks that this lane has
    team_.receive_row(n_, [&](int rank, const typename Team::RowNumbers& numbers) {
      const Sum more_units = units_of(rank);
      Units<Sum, N> more;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        more.at[i] = numbers.at[i];
        part.squares.at[i] += numbers.at[N + i];
      }
      if (part.units > 0 && more_units > 0)
        add_distance(part.units * more_units / (part.units + more_units), means(part.sums, part_of(part.units)),
                     means(more, part_of(more_units)));
      add(part.sums, more);
      part.units += more_units;
    });
    const Units<Sum, N> mean = means(total(part.sums), of_all);
    if (part.units > 0) add_distance(part.units, means(part.sums, part_of(part.units)), mean);
    return {mean, means(total(part.squares), of_all)};
  }

  // N sums over all units, from those of this lane.
  template <int N>
  __device__ __forceinline__ Units<Sum, N> sums(const Units<Sum, N>& of_lane) {
    const Units<Sum, N> own = total(of_lane);
    if (team_.alone()) return own;
    typename Team::RowNumbers numbers{};
#pragma unroll
    for (int i = 0; i < N; ++i) numbers.at[i] = own.at[i];
    team_.send_row(n_, rows_, numbers);
    Units<Sum, N> of_ranks{};
    team_.receive_row(n_, [&](int, const typename Team::RowNumbers& numbers) {
#pragma unroll
      for (int i = 0; i < N; ++i) of_ranks.at[i] += numbers.at[i];
    });
    return total(of_ranks);
  }

 private:
  template <int N>
  static __device__ __forceinline__ void add(Units<Sum, N>& sums, const Units<Sum, N>& more) {
#pragma unroll
    for (int i = 0; i < N; ++i) sums.at[i] += more.at[i];
  }
  template <int N>
  static __device__ __forceinline__ Units<Sum, N> total(Units<Sum, N> sums) {
#pragma unroll
    for (int i = 0; i < N; ++i) sums.at[i] = total_of_lanes<32>(sums.at[i]);
    return sums;
  }

  static __device__ __forceinline__ Sum part_of(Sum units) { return 1 / max(units, Sum(1)); }  // of no units is no sum

  // Those of a rank: the last ones may have none.
  __device__ __forceinline__ Sum units_of(int rank) const {
    return static_cast<Sum>(max(min(units_.limit - rank * units_.width, units_.width), 0));
  }

  Team& team_;
  const Share& units_;
  const int n_, rows_;
};

}  // namespace lstm_ext::cuda
