// The product of a step: a rank's part of the weights, kept on chip, times an operand in shared memory.
//
//   sums[m, n] = sum over k of weights[m, k] operand[k, n]      m: rows, n: up to 8, 16 or 32 sequences
//
// A warp takes one step after the other: the weights of a step are a group of 32 rows times one tile of k, and all
// batch tiles of the operand are multiplied with them. It has the sums of its row group in registers, and when the last
// of its k tiles is done it stores them to `partial`. Warps side by side along k split it:
//
//                             k tiles of split 0   of split 1                      partial [split, n, m]
//   row group 0 (2 warps      warp 0               warp 2         x  operand  ->   0: warp 0   1: warp 2
//             1  along rows)  warp 1               warp 3            [k, n]           warp 1      warp 3
//             2               warp 0               warp 2                             warp 0      warp 2
//
// The splits are then added up, always in the same order (`total`): results do not depend on which warp was first.
//
// Registers of a thread: 16 steps x 2 tiles x 4 words of weights (float32, float64: 1 tile), which is half of all that
// there are, and 4 sums for each row tile and batch tile (8 in the plain tiles).
#pragma once

#include "layout.h"
#include "tile.cuh"

namespace lstm_ext::cuda {

// ---- Weights from global memory ---------------------------------------------------------------------------------

// `N` numbers that lie together from each of `from(0)` on, `M` times: each in one load where all addresses allow it,
// and none waits for another.
template <class T, int M, int N, class From>
__device__ __forceinline__ void load_together(T (&to)[M][N], const From& from) {
  struct alignas(N * sizeof(T)) Together {
    T at[N];
  };
  uintptr_t addresses = 0;
#pragma unroll
  for (int m = 0; m < M; ++m) addresses |= reinterpret_cast<uintptr_t>(from(m));
  if (addresses % sizeof(Together) == 0) {
    Together all[M];
#pragma unroll
    for (int m = 0; m < M; ++m) all[m] = *reinterpret_cast<const Together*>(from(m));
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n) to[m][n] = all[m].at[n];
  } else {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n) to[m][n] = from(m)[n];
  }
}

// A lane's weights of one step.
template <class Tile>
struct GroupWeights {
  uint4 tile[Tile::kRowTiles];
};

// Those whose first row and column stand at these positions; zeros where there are none, so that what meets them there
// counts nothing. Not inlined: it runs once for each step, and is large.
template <class Tile>
__device__ __noinline__ GroupWeights<Tile> fetch_weights(const ProductLayout& product, const void* weights,
                                                         int first_row, int first_column) {
  using Number = typename Tile::Number;
  constexpr int kRows = Tile::kLaneRows, kColumns = Tile::kLaneColumns;
  const auto* data = static_cast<const Number*>(weights);
  int64_t row[kRows], column[kColumns];
#pragma unroll
  for (int i = 0; i < kRows; ++i) row[i] = product.rows.index_of(first_row + i);
#pragma unroll
  for (int j = 0; j < kColumns; ++j) column[j] = product.columns.index_of(first_column + j);
  Number numbers[kRows][kColumns];
  // Rows or columns of one group lie side by side.
  const bool columns_together = product.column_stride == 1 && product.columns.groups == 1 && column[kColumns - 1] >= 0;
  const bool rows_together = product.row_stride == 1 && product.rows.groups == 1 && row[kRows - 1] >= 0;
  const auto or_first = [](int64_t index) { return max(index, int64_t{0}); };  // loads what does not count, too
  if (columns_together) {
    load_together(numbers, [&](int i) { return data + or_first(row[i]) * product.row_stride + column[0]; });
  } else if (rows_together) {
    Number together[kColumns][kRows];
    load_together(together, [&](int j) { return data + row[0] + or_first(column[j]) * product.column_stride; });
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) numbers[i][j] = together[j][i];
  } else {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        if (row[i] >= 0 && column[j] >= 0)
          numbers[i][j] = data[row[i] * product.row_stride + column[j] * product.column_stride];
  }
  typename Tile::OnChip on_chip[Tile::kRowTiles][16 / sizeof(typename Tile::OnChip)];
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
      on_chip[i * Tile::kRowTiles / kRows][Tile::place(i, j)] =
          row[i] < 0 || column[j] < 0 ? Tile::on_chip(0) : Tile::keep(numbers[i][j]);
  return bits_as<GroupWeights<Tile>>(on_chip);
}

// ---- Sums -------------------------------------------------------------------------------------------------------

// The sums of a warp over one group of rows and all batch tiles: as several sums, taken in turn, where there would be
// too few of them to keep the tensor cores busy.
template <class Tile, int kBatchTiles>
struct GroupSums {
  static constexpr int kSets = Tile::kRowTiles == 2 && kBatchTiles == 1 ? 2 : 1;
  typename Tile::Sum at[kSets][kBatchTiles][Tile::kRowTiles][Tile::kSums];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int set = 0; set < kSets; ++set)
#pragma unroll
      for (int t = 0; t < kBatchTiles; ++t)
#pragma unroll
        for (int m = 0; m < Tile::kRowTiles; ++m)
#pragma unroll
          for (int n = 0; n < Tile::kSums; ++n) at[set][t][m][n] = 0;
  }

  // Step number `step`; `operand` is that of its k tile.
  __device__ __forceinline__ void add(int step, const GroupWeights<Tile>& weights, const typename Tile::OnChip* operand,
                                      int lane) {
#pragma unroll
    for (int t = 0; t < kBatchTiles; ++t)
      Tile::multiply(at[step % kSets][t], weights.tile, operand + t * Tile::kK * kBatchColumns, lane);
  }

  // To the sums of the group's first row, [sequences, stride]. The stride leaves no two lanes on a bank.
  __device__ __forceinline__ void store(typename Tile::Sum* partial, int stride, int lane) {
#pragma unroll
    for (int t = 0; t < kBatchTiles; ++t) {
#pragma unroll
      for (int set = 1; set < kSets; ++set)
#pragma unroll
        for (int m = 0; m < Tile::kRowTiles; ++m)
#pragma unroll
          for (int n = 0; n < Tile::kSums; ++n) at[0][t][m][n] += at[set][t][m][n];
      Tile::store(at[0][t], partial + t * kBatchColumns * stride, stride, lane);
    }
  }
};

// The sums over 1, 2, 4 or 8 splits of some adjacent rows: `Numbers` is a Units.
template <class Numbers, class Sum>
__device__ __forceinline__ Numbers total(const Sum* partial, int splits, int split_stride) {
  const auto read = [&](int split) { return *reinterpret_cast<const Numbers*>(partial + split * split_stride); };
  const auto add = [](Numbers& to, const Numbers& from) {
#pragma unroll
    for (int n = 0; n < Numbers::kCount; ++n) to.at[n] += from.at[n];
  };
  Numbers sum = read(0);
  if (splits == 1) return sum;
  if (splits == 2) {
    add(sum, read(1));
    return sum;
  }
#pragma unroll
  for (int first = 0; first < kWarps; first += kWarps / 2) {
    if (first == splits) break;
    Numbers more[kWarps / 2];
#pragma unroll
    for (int n = first == 0; n < kWarps / 2; ++n) more[n] = read(first + n);
#pragma unroll
    for (int n = first == 0; n < kWarps / 2; ++n) add(sum, more[n]);
  }
  return sum;
}

// ---- On chip ----------------------------------------------------------------------------------------------------

// The weights of one product: each warp's first kRegisterSteps steps in registers, the rest in shared memory.
template <class Tile, int kBatchTiles, int kRegisterSteps>
class OnChipWeights {
 public:
  using OnChip = typename Tile::OnChip;
  using Sum = typename Tile::Sum;
  static constexpr int kSequences = kBatchTiles * kBatchColumns;

  __device__ OnChipWeights(const ProductLayout& product, char* shared)
      : shared_(reinterpret_cast<uint4*>(shared + product.tiles_offset) +
                warp() * product.shared_steps * Tile::kRowTiles * 32 + lane()) {}

  // Rows and columns from these positions on are this rank's.
  __device__ void load(const ProductLayout& product, const void* weights, int first_row, int first_column) {
    const int run = product.run;
    const int columns = first_column + split(product) * product.warp_k_tiles * Tile::kK + Tile::lane_column(lane());
    const auto fetch = [&](int group, int k_tile) {
      return fetch_weights<Tile>(product, weights, first_row + group * kGroupRows + Tile::lane_row(lane()),
                                 columns + k_tile * Tile::kK);
    };
    int group = first_group(product), k_tile = 0;
    // Unrolled, as an array whose index is not a constant would not stay in registers.
#pragma unroll
    for (int step = 0; step < kRegisterSteps; ++step) {
      registers_[step] = {};
      if (group >= product.row_groups || step / run * run + run > kRegisterSteps) continue;
      registers_[step] = fetch(group, k_tile);
      if (++k_tile == run) k_tile = 0, group += groups_apart(product);
    }
    const int in_registers = kRegisterSteps / run;  // groups
    uint4* to = shared_;
    for (int n = 0; (group = first_group(product) + n * groups_apart(product)) < product.row_groups; ++n) {
      for (k_tile = n < in_registers ? run : 0; k_tile < product.warp_k_tiles; ++k_tile) {
        const GroupWeights<Tile> weights_of_step = fetch(group, k_tile);
#pragma unroll
        for (int m = 0; m < Tile::kRowTiles; ++m, to += 32) *to = weights_of_step.tile[m];
      }
    }
  }

  // Each warp writes its sums to partial [split, sequences, stride]; every sum there is written.
  __device__ __forceinline__ void multiply(const ProductLayout& product, const OnChip* operand, Sum* partial,
                                           int stride) const {
    operand += split(product) * product.warp_k_tiles * kOperandTile;
    partial += split(product) * kSequences * stride;
    if constexpr (kRegisterSteps == 0) return multiply_run<0>(product, operand, partial, stride);
    switch (product.run) {  // one of kRuns of the planner
      case 1: return multiply_run<1>(product, operand, partial, stride);
      case 2: return multiply_run<2>(product, operand, partial, stride);
      case 4: return multiply_run<4>(product, operand, partial, stride);
      case 8: return multiply_run<8>(product, operand, partial, stride);
      case 12: return multiply_run<12>(product, operand, partial, stride);
      default: return multiply_run<16>(product, operand, partial, stride);
    }
  }

 private:
  static constexpr int kOperandTile = kSequences * Tile::kK;
  using Sums = GroupSums<Tile, kBatchTiles>;

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / 32; }
  static __device__ __forceinline__ int groups_apart(const ProductLayout& product) { return 1 << product.log_warps_m; }
  static __device__ __forceinline__ int first_group(const ProductLayout& product) {
    return warp() & (groups_apart(product) - 1);
  }
  static __device__ __forceinline__ int split(const ProductLayout& product) { return warp() >> product.log_warps_m; }

  // Straight code for the groups in registers, each of kRun steps; a loop for what follows in shared memory.
  template <int kRun>
  __device__ __forceinline__ void multiply_run(const ProductLayout& product, const OnChip* operand, Sum* partial,
                                               int stride) const {
    constexpr int kGroups = kRun > 0 ? kRegisterSteps / kRun : 0;
    const uint4* next = shared_;
    int group = first_group(product);
#pragma unroll
    for (int n = 0; n < kGroups; ++n, group += groups_apart(product)) {
      if (group >= product.row_groups) return;
      Sums sums;
      sums.clear();
#pragma unroll
      for (int step = 0; step < kRun; ++step)
        sums.add(step, registers_[n * kRun + step], operand + step * kOperandTile, lane());
      if constexpr (kRun == kRegisterSteps) add_from_shared(sums, next, operand, kRun, product.warp_k_tiles);
      sums.store(partial + group * kGroupRows, stride, lane());
    }
    for (; group < product.row_groups; group += groups_apart(product)) {
      Sums sums;
      sums.clear();
      add_from_shared(sums, next, operand, 0, product.warp_k_tiles);
      sums.store(partial + group * kGroupRows, stride, lane());
    }
  }

  static __device__ __forceinline__ void add_from_shared(Sums& sums, const uint4*& next, const OnChip* operand,
                                                         int from, int to) {
    const auto add = [&](int set, int step) {
      GroupWeights<Tile> weights;
#pragma unroll
      for (int m = 0; m < Tile::kRowTiles; ++m, next += 32) weights.tile[m] = *next;
      sums.add(set, weights, operand + step * kOperandTile, lane());
    };
#pragma unroll 2
    for (; from + 1 < to; from += 2) {
      add(0, from);
      add(1, from + 1);
    }
    if (from < to) add(0, from);
  }

  uint4* shared_;
  GroupWeights<Tile> registers_[kRegisterSteps > 0 ? kRegisterSteps : 1];
};

}  // namespace lstm_ext::cuda
