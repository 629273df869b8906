// The product of a launch for each step: a block's tile of weights times operand, streamed through shared memory.
//
//                           sequences of the tile, warps_n * 8 kBatchTiles
//                          +-----------+-----------+
//   rows of the weights,   |  warp 0   |  warp 2   |     A warp has 32 rows and 8 kBatchTiles sequences of the sums in
//   warps_m * 32           +-----------+-----------+     registers. Here warps_m = warps_n = 2: 4 warps cover the tile,
//                          |  warp 1   |  warp 3   |     and 2 splits of them take every other k tile of a stage.
//                          +-----------+-----------+
//
// k passes in stages of 128 bytes (64 numbers of a half type, 32 of float32, 16 of float64), three of which are in
// shared memory: one is multiplied while the next two are on their way. With several blocks along k (a cluster) each
// takes its part of the stages, and reads the others' sums at the end.
//
//   stage    weights [rows, 128 bytes of k]; transposed [k, rows], as they lie in memory
//            operand [sequences, 128 bytes of k]
//
// 16 bytes are a chunk, and a row's chunks stand in an order of its own: the 8 rows that a quarter of a warp reads at a
// time lie in different banks. A thread copies the same chunk of every 32nd row, and keeps the rows' addresses from
// stage to stage.
#pragma once

#include "layout.h"
#include "tile.cuh"

namespace lstm_ext::cuda {

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

inline constexpr int kChunkBytes = 16, kStageChunks = kStageBytes / kChunkBytes;

// A chunk of which `bytes` are there, and the rest is zero, from an address that need not be a multiple of 16. What is
// there ends at that of a row: nothing behind it is read.
template <class Number>
__device__ __noinline__ void copy_unaligned_chunk(char* to, const char* from, int bytes) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(from);
  if (bytes >= kChunkBytes && address % 8 == 0) {
    for (int at = 0; at < kChunkBytes; at += 8) cp_async_8(to + at, from + at);
  } else if (bytes >= kChunkBytes && address % 4 == 0) {
    for (int at = 0; at < kChunkBytes; at += 4) cp_async_4(to + at, from + at);
  } else {
    constexpr int kNumbers = kChunkBytes / sizeof(Number);
    struct alignas(kChunkBytes) Numbers {
      Number at[kNumbers];
    } numbers = {};
#pragma unroll
    for (int n = 0; n < kNumbers; ++n)
      if (n * int{sizeof(Number)} < bytes) numbers.at[n] = reinterpret_cast<const Number*>(from)[n];
    *reinterpret_cast<Numbers*>(to) = numbers;
  }
}

inline __device__ bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % kChunkBytes == 0;
}

// kAligned: the address is a multiple of 16, and the chunk is there whole or not at all.
template <class Number, bool kAligned>
__device__ __forceinline__ void copy_chunk(char* to, const char* from, int bytes) {
  if constexpr (kAligned) {
    cp_async_16_if(bytes > 0, to, from);
  } else {
    copy_unaligned_chunk<Number>(to, from, bytes);
  }
}

// All threads together copy one chunk each of kRowsTogether rows; a thread's next chunk goes kChunksApart bytes behind.
inline constexpr int kChunksApart = kThreads * kChunkBytes, kRowsTogether = kThreads / kStageChunks;

// Calls copy(n) for the first `count` of kMost, which is a power of two or 0: a branch costs as much as a copy, and
// there is one at such numbers alone.
template <int kMost, class Copy>
__device__ __forceinline__ void for_chunks(int count, const Copy& copy) {
#pragma unroll
  for (int n = 0; n < kMost; ++n) {
    if (n >= 2 && (n & (n - 1)) == 0 && n >= count) break;
    if (n >= 2 || n < count) copy(n);
  }
}

// What a thread copies of rows that lie one below the other in a stage, 128 bytes of each: the same chunk of every
// kRowsTogether-th, of up to kMost of them.
// kSomeZero: whether some rows may be zeros.
template <class Number, bool kAligned, int kMost, bool kSomeZero>
class RowChunks {
 public:
  static constexpr int kChunkNumbers = kChunkBytes / sizeof(Number);
  static_assert(kRowsTogether % kStageChunks == 0);  // so the chunks of all these rows stand in the same order

  // Each of `rows` has `columns` numbers, and starts where `starts` says, or is zeros for null. They go to byte
  // `offset` of a stage.
  __device__ __forceinline__ RowChunks(const char* const* starts, int rows, int64_t columns, int offset)
      : columns_(static_cast<int>(columns)) {
    const int row = static_cast<int>(threadIdx.x) / kStageChunks;
    place_ = offset + row * kStageBytes + (chunk_in_stage() ^ row % kStageChunks) * kChunkBytes;
    count_ = row < rows ? max(1, rows / kRowsTogether) : 0;
#pragma unroll
    for (int n = 0; n < kMost; ++n) {
      from_[n] = n < count_ ? reinterpret_cast<uintptr_t>(starts[row + n * kRowsTogether]) : 0;
      if constexpr (kSomeZero) there_ |= static_cast<uint32_t>(from_[n] != 0) << n;
    }
    if constexpr (kSomeZero) keep(there_);
  }

  // Stage number `number` of the product.
  __device__ __forceinline__ void copy(char* stage, int number) {
    char* const to = stage + place_;
    const int chunk = number * kStageChunks + chunk_in_stage();
    const uint64_t at = static_cast<uint64_t>(static_cast<uint32_t>(chunk)) * kChunkBytes;
    const int bytes = max(0, min(columns_ - chunk * kChunkNumbers, kChunkNumbers)) * int{sizeof(Number)};
    for_chunks<kMost>(count_, [&](int n) {
      const bool there = !kSomeZero || (there_ >> n & 1);
      copy_chunk<Number, kAligned>(to + n * kChunksApart, reinterpret_cast<const char*>(from_[n] + at),
                                   there ? bytes : 0);
    });
  }

 private:
  static __device__ int chunk_in_stage() { return static_cast<int>(threadIdx.x) % kStageChunks; }

  uintptr_t from_[kMost];        // where the rows start
  uint32_t there_ = 0;           // bit n: from_[n] is a row, and not zeros
  int columns_, count_, place_;  // the latter of a thread's chunks in a stage, and where the first of them goes
};

// The same of transposed weights [k, rows]: the rows of a stage are rows of memory, of which a block takes its columns.
// A thread has a chunk of columns, and goes down every so many rows.
template <class Number, bool kAligned, int kMost>
class ColumnChunks {
 public:
  // Of a matrix of `rows`, every 2^apart_log2-th from `first` on; `bytes` of the chunk at `column` are there. A stage
  // has `count` of them, the first of which goes to `place`.
  __device__ __forceinline__ ColumnChunks(const Matrix& weights, int64_t rows, int64_t first, int apart_log2,
                                          int64_t column, int bytes, int count, int place)
      : from_(reinterpret_cast<const char*>(static_cast<const Number*>(weights.data) + first * weights.row_stride +
                                            column)),
        apart_((weights.row_stride << apart_log2) * int64_t{sizeof(Number)}),
        left_(bytes > 0 ? static_cast<int>((rows - first + (1 << apart_log2) - 1) >> apart_log2) : 0),
        bytes_(bytes),
        count_(count),
        place_(place) {
    keep(apart_);
    keep(bytes_);
    keep(count_);
    keep(place_);
  }

  // Stage after stage, whatever its number.
  __device__ __forceinline__ void copy(char* stage, int) {
    char* const to = stage + place_;
    const int bytes = kAligned ? kChunkBytes : bytes_;
    for_chunks<kMost>(count_, [&](int n) {
      copy_chunk<Number, kAligned>(to + n * kChunksApart, from_, n < left_ ? bytes : 0);
      from_ += apart_;
    });
    left_ -= count_;
  }

 private:
  const char* from_;
  int64_t apart_;
  int left_, bytes_, count_, place_;  // left_: chunks of all stages that are still to come
};

// What a lane reads of the stages, and multiplies: for the kinds of arithmetic, each with the weights as they are or
// transposed. `row` is the warp's first in the tile, `operand_row` that of its sequences in a stage, `pitch` the bytes
// of a row of transposed weights.
template <class Tile, bool kTransposed>
struct LaneOperands;

// ldmatrix gives the lanes of a warp the fragments of mma.sync: 8 rows of 16 bytes for each register of them, which are
// 8 numbers of a half type or 4 of TF32. Registers 0 .. 3 of a lane are of rows 0, 8, 0, 8 and of chunks 0, 0, 1, 1 of
// the weights, and of two batch tiles' chunks 0, 1, 0, 1 of the operand.
struct MmaOperands {
  static constexpr int kRowTileBytes = 16 * kStageBytes, kTilePairBytes = 2 * kBatchColumns * kStageBytes;

  int operand_at;  // of the k tile 0

  __device__ explicit MmaOperands(int operand_row) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, r = lane % 8;
    operand_at = (operand_row + matrix / 2 * 8 + r) * kStageBytes + (matrix % 2 ^ r) * kChunkBytes;
    keep(operand_at);
  }

  // A k tile has two chunks: the bits of its number are none of those of a row's place.
  static __device__ __forceinline__ int at_tile(int at, int k_tile) { return at ^ k_tile * (2 * kChunkBytes); }

  // The operand of batch tiles t and t + 1 (of which the last may not be there).
  template <int kBatchTiles>
  __device__ __forceinline__ void operand(uint2 (&b)[kBatchTiles], const char* stage, int k_tile) const {
    const char* from = stage + at_tile(operand_at, k_tile);
    if constexpr (kBatchTiles == 1) {
      b[0] = ldmatrix_x2(from);
    } else {
#pragma unroll
      for (int t = 0; t < kBatchTiles; t += 2) {
        const uint4 two = ldmatrix_x4(from + t / 2 * kTilePairBytes);
        b[t] = {two.x, two.y};
        b[t + 1] = {two.z, two.w};
      }
    }
  }
};

struct MmaRowOperands : MmaOperands {
  int weights_at;

  __device__ MmaRowOperands(int row, int operand_row) : MmaOperands(operand_row) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, r = lane % 8;
    weights_at = (row + matrix % 2 * 8 + r) * kStageBytes + (matrix / 2 ^ r) * kChunkBytes;
    keep(weights_at);
  }

  __device__ __forceinline__ void weights(uint4 (&a)[2], const char* stage, int k_tile) const {
    const char* from = stage + at_tile(weights_at, k_tile);
#pragma unroll
    for (int m = 0; m < 2; ++m) a[m] = ldmatrix_x4(from + m * kRowTileBytes);
  }
};

__device__ __forceinline__ void multiply_tile(float (&d)[4], const uint4& a, const uint2& b, const __half*) {
  mma_fp16(d, a, b);
}
__device__ __forceinline__ void multiply_tile(float (&d)[4], const uint4& a, const uint2& b, const __nv_bfloat16*) {
  mma_bf16(d, a, b);
}

template <class T>
struct LaneOperands<HalfTile<T>, false> : MmaRowOperands {
  __device__ LaneOperands(int row, int operand_row, int) : MmaRowOperands(row, operand_row) {}

  template <int kBatchTiles>
  __device__ __forceinline__ void multiply(Sums<HalfTile<T>, kBatchTiles>& sums, const char* stage, int k_tile) const {
    uint4 a[2];
    uint2 b[kBatchTiles];
    weights(a, stage, k_tile);
    operand(b, stage, k_tile);
#pragma unroll
    for (int t = 0; t < kBatchTiles; ++t)
#pragma unroll
      for (int m = 0; m < 2; ++m) multiply_tile(sums.at[t][m], a[m], b[t], static_cast<const T*>(nullptr));
  }
};

template <class T>
struct LaneOperands<HalfTile<T>, true> : MmaOperands {
  static constexpr int kSwizzle = 7,
                       kSwizzleStep = 1;  // row k: its chunks are swapped by (k & kSwizzle) * kSwizzleStep

  int weights_at, k_tile_bytes;

  __device__ LaneOperands(int row, int operand_row, int pitch) : MmaOperands(operand_row), k_tile_bytes(16 * pitch) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, r = lane % 8;
    weights_at = (matrix / 2 * 8 + r) * pitch + ((row / 8 + matrix % 2) ^ r) * kChunkBytes;
    keep(weights_at);
  }

  template <int kBatchTiles>
  __device__ __forceinline__ void multiply(Sums<HalfTile<T>, kBatchTiles>& sums, const char* stage, int k_tile) const {
    uint4 a[2];
    uint2 b[kBatchTiles];
#pragma unroll
    for (int m = 0; m < 2; ++m)
      a[m] = ldmatrix_x4_transposed(stage + (weights_at ^ m * (2 * kChunkBytes)) + k_tile * k_tile_bytes);
    operand(b, stage, k_tile);
#pragma unroll
    for (int t = 0; t < kBatchTiles; ++t)
#pragma unroll
      for (int m = 0; m < 2; ++m) multiply_tile(sums.at[t][m], a[m], b[t], static_cast<const T*>(nullptr));
  }
};

__device__ __forceinline__ uint32_t word_to_tf32(uint32_t word) { return to_tf32(__uint_as_float(word)); }

template <int kBatchTiles>
__device__ __forceinline__ void multiply_tf32(Sums<Tf32Tile, kBatchTiles>& sums, uint4 (&a)[2],
                                              uint2 (&b)[kBatchTiles]) {
#pragma unroll
  for (int m = 0; m < 2; ++m)
    a[m] = {word_to_tf32(a[m].x), word_to_tf32(a[m].y), word_to_tf32(a[m].z), word_to_tf32(a[m].w)};
#pragma unroll
  for (int t = 0; t < kBatchTiles; ++t) {
    b[t] = {word_to_tf32(b[t].x), word_to_tf32(b[t].y)};
#pragma unroll
    for (int m = 0; m < 2; ++m) mma_tf32(sums.at[t][m], a[m], b[t]);
  }
}

template <>
struct LaneOperands<Tf32Tile, false> : MmaRowOperands {
  __device__ LaneOperands(int row, int operand_row, int) : MmaRowOperands(row, operand_row) {}

  template <int kBatchTiles>
  __device__ __forceinline__ void multiply(Sums<Tf32Tile, kBatchTiles>& sums, const char* stage, int k_tile) const {
    uint4 a[2];
    uint2 b[kBatchTiles];
    weights(a, stage, k_tile);
    operand(b, stage, k_tile);
    multiply_tf32(sums, a, b);
  }
};

// ldmatrix transposes numbers of 16 bits only: here a lane reads word by word.
template <>
struct LaneOperands<Tf32Tile, true> : MmaOperands {
  static constexpr int kSwizzle = 3, kSwizzleStep = 2;

  int weights_at, pitch;

  __device__ LaneOperands(int row, int operand_row, int pitch) : MmaOperands(operand_row), pitch(pitch) {
    const int g = threadIdx.x % 32 / 4, k = threadIdx.x % 4;
    weights_at = k * pitch + ((row / 4 + g / 4) ^ k * kSwizzleStep) * kChunkBytes + g % 4 * 4;
  }

  template <int kBatchTiles>
  __device__ __forceinline__ void multiply(Sums<Tf32Tile, kBatchTiles>& sums, const char* stage, int k_tile) const {
    uint4 a[2];
    uint2 b[kBatchTiles];
    const char* rows = stage + k_tile * 8 * pitch;
    const auto word = [&](int m, int half, int k) {  // rows 0 and 8 of a row tile are 2 chunks apart
      return *reinterpret_cast<const uint32_t*>(rows + (weights_at ^ (4 * m + 2 * half) * kChunkBytes) + k * pitch);
    };
#pragma unroll
    for (int m = 0; m < 2; ++m) a[m] = {word(m, 0, 0), word(m, 1, 0), word(m, 0, 4), word(m, 1, 4)};
    operand(b, stage, k_tile);
    multiply_tf32(sums, a, b);
  }
};

// Without tensor cores a lane has one row, and the operand is read by all lanes at once. A k tile is a chunk.
template <class T, class TMath, bool kTransposed>
struct LaneOperands<PlainTile<T, TMath>, kTransposed> {
  using Tile = PlainTile<T, TMath>;
  static constexpr int kSwizzle = 0, kSwizzleStep = 0;  // a warp reads a row of transposed weights whole

  struct alignas(kChunkBytes) Numbers {
    T at[Tile::kK];
  };

  int row, operand_row, pitch;

  __device__ LaneOperands(int first_row, int operand_row, int pitch)
      : row(first_row + static_cast<int>(threadIdx.x) % 32), operand_row(operand_row), pitch(pitch) {}

  __device__ __forceinline__ Numbers weights(const char* stage, int k_tile) const {
    if constexpr (kTransposed) {
      Numbers numbers;
#pragma unroll
      for (int k = 0; k < Tile::kK; ++k)
        numbers.at[k] = reinterpret_cast<const T*>(stage + (k_tile * Tile::kK + k) * pitch)[row];
      return numbers;
    } else {
      return chunk(stage + row * kStageBytes, k_tile ^ row % kStageChunks);
    }
  }

  static __device__ __forceinline__ Numbers chunk(const char* row, int n) {
    const uint4 words = reinterpret_cast<const uint4*>(row)[n];  // in one load: not by reference
    return bits_as<Numbers>(words);
  }

  template <int kBatchTiles>
  __device__ __forceinline__ void multiply(Sums<Tile, kBatchTiles>& sums, const char* stage, int k_tile) const {
    const Numbers a = weights(stage, k_tile);
    const char* operand = stage + operand_row * kStageBytes;
#pragma unroll
    for (int n = 0; n < kBatchTiles * kBatchColumns; ++n) {
      const Numbers b = chunk(operand + n * kStageBytes, k_tile ^ n % kStageChunks);
#pragma unroll
      for (int k = 0; k < Tile::kK; ++k) sums.at[n / kBatchColumns][0][n % kBatchColumns] += a.at[k] * b.at[k];
    }
  }
};

}  // namespace lstm_ext::cuda
