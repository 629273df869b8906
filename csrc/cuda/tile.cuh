// Tiles of a product on chip: which lane of a warp holds which numbers, for each kind of arithmetic.
//
//   sums [kM, 8]  +=  weights [kM, kK]  x  operand [kK, 8]
//
// The weights are 16 bytes in each of 32 lanes, in registers. The operand lies in shared memory, in the order in which
// the lanes read it (operand_offset), so that they meet no bank conflict; all warps read the same. A lane has kSums of
// the sums. The weights are the M of mma.sync and the 8 sequences of a batch tile its N, as batches are often small.
//
// For bfloat16 and float16 (m16n8k16) "3:4" is number 4 of lane 3, two of which are a register:
//
//   weights  k  0    1  |  2    3  |  4    5  |  6    7  |  8    9  | ... | 14   15
//   row  0     0:0  0:1 | 1:0  1:1 | 2:0  2:1 | 3:0  3:1 | 0:4  0:5 | ... | 3:4  3:5
//   row  1     4:0  4:1 | 5:0  5:1 | 6:0  6:1 | 7:0  7:1 | 4:4  4:5 | ... | 7:4  7:5
//    ...
//   row  8     0:2  0:3 | 1:2  1:3 | 2:2  2:3 | 3:2  3:3 | 0:6  0:7 | ... | 3:6  3:7
//
//   operand  k  0    1  |  2    3  | ... |  8    9  | ...       sums  n  0    1  |  2    3  | ... |  6    7
//   n 0        0:0  0:1 | 1:0  1:1 | ... | 0:2  0:3 | ...       row 0   0:0  0:1 | 1:0  1:1 | ... | 3:0  3:1
//   n 1        4:0  4:1 | 5:0  5:1 | ... | 4:2  4:3 | ...       row 8   0:2  0:3 | 1:2  1:3 | ... | 3:2  3:3
//
// TF32 (m16n8k8) is the same with one number in a register. float32 and float64 are multiplied without tensor cores: a
// lane has one of 32 rows, all of its k, and the sums of all 8 sequences.
#pragma once

#include <cstring>

#include "../gate_math.h"
#include "layout.h"
#include "ptx.h"

namespace lstm_ext::cuda {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <class T, class Sum>
__device__ __forceinline__ T narrow(Sum x) {
  return static_cast<T>(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16, float>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half narrow<__half, float>(float x) {
  return __float2half_rn(x);
}

struct ExactMath {
  using Value = float;
  using Number = float;
  static __device__ __forceinline__ float expm1(float x) { return ::expm1f(x); }
  static __device__ __forceinline__ float log1p(float x) { return ::log1pf(x); }
  static __device__ __forceinline__ float inverse(float x) { return 1 / x; }
  static __device__ __forceinline__ float exp(float x) { return ::expf(x); }
  static __device__ __forceinline__ float tanh(float x) { return ::tanhf(x); }
};

struct DoubleMath {
  using Value = double;
  using Number = double;
  static __device__ __forceinline__ double expm1(double x) { return ::expm1(x); }
  static __device__ __forceinline__ double log1p(double x) { return ::log1p(x); }
  static __device__ __forceinline__ double inverse(double x) { return 1 / x; }
  static __device__ __forceinline__ double exp(double x) { return ::exp(x); }
  static __device__ __forceinline__ double tanh(double x) { return ::tanh(x); }
};

// To about 1e-7, absolutely: far below what half types and TF32 keep.
struct FastMath {
  using Value = float;
  using Number = float;
  static __device__ __forceinline__ float expm1(float x) { return fast_exp(x) - 1; }
  static __device__ __forceinline__ float log1p(float x) { return ::log1pf(x); }
  static __device__ __forceinline__ float inverse(float x) { return fast_inverse(x); }
  static __device__ __forceinline__ float exp(float x) { return fast_exp(x); }
  static __device__ __forceinline__ float tanh(float x) { return 1 - 2 * fast_inverse(1 + fast_exp(2 * x)); }
};

template <class To, class From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// To what so many bytes are aligned that are read and written by as few accesses as it takes.
constexpr size_t access_bytes(size_t bytes, size_t otherwise) {
  if (bytes % 16 == 0) return 16;
  return bytes < 16 ? bytes : otherwise;
}

// A number of each of N adjacent units.
template <class T, int N>
struct alignas(access_bytes(N * sizeof(T), alignof(T))) Units {
  static constexpr int kCount = N;
  T at[N];
};

// As many as one access has.
template <class T>
using Piece = Units<T, 16 / sizeof(T)>;

// What bf16, fp16 and TF32 have in common: mma.sync, a lane's sums are of 2 rows and 2 sequences. Two row tiles are
// multiplied with each operand tile, so that it is read half as often.
struct MmaTile {
  static constexpr int kM = 16, kSums = 4, kRowTiles = 2;
  static constexpr int kRegisterSteps = 16;
  // A lane has four rows of a group that lie together, and all its columns of a k tile do: rows 2m and 2m + 1 of them
  // stand for those lane / 4 and lane / 4 + 8 of row tile m in the table above.
  static constexpr int kLaneRows = 4;
  static __device__ __forceinline__ int lane_row(int lane) { return lane / 4 * 4; }

  // The sums of a lane to those of row 0 of its group, [sequences, stride].
  static __device__ __forceinline__ void store(const float (&sums)[kRowTiles][kSums], float* to, int stride, int lane) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float rows[] = {sums[0][n], sums[0][2 + n], sums[1][n], sums[1][2 + n]};
      *reinterpret_cast<uint4*>(to + (lane % 4 * 2 + n) * stride + lane_row(lane)) = bits_as<uint4>(rows);
    }
  }
  static __device__ __forceinline__ int sum_row(int lane, int n) { return lane / 4 + n / 2 * 8; }
  static __device__ __forceinline__ int sum_column(int lane, int n) { return lane % 4 * 2 + n % 2; }
};

template <class T>
struct HalfTile : MmaTile {
  using Number = T;  // in global memory
  using OnChip = T;
  using Sum = float;
  using Math = FastMath;
  static constexpr int kK = 16, kLaneColumns = 4;
  static __device__ __forceinline__ int lane_column(int lane) { return lane % 4 * 4; }
  // Where number (row i, column j) of a lane stands in the 16 bytes of its row tile i / 2.
  static __device__ __forceinline__ int place(int i, int j) { return j / 2 * 4 + i % 2 * 2 + j % 2; }

  // What is multiplied, from a sum; from a number in global memory.
  static __device__ __forceinline__ OnChip on_chip(Sum x) { return narrow<T>(x); }
  static __device__ __forceinline__ OnChip keep(Number x) { return x; }
  static __device__ __forceinline__ void multiply(float (&sums)[kRowTiles][kSums], const uint4 (&weights)[kRowTiles],
                                                  const OnChip* operand, int lane) {
    const uint2 b = reinterpret_cast<const uint2*>(operand)[lane];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) multiply(sums[m], weights[m], b, T());
  }

 private:
  static __device__ __forceinline__ void multiply(float (&d)[4], const uint4& a, const uint2& b, __half) {
    mma_fp16(d, a, b);
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], const uint4& a, const uint2& b, __nv_bfloat16) {
    mma_bf16(d, a, b);
  }
};

struct Tf32Tile : MmaTile {
  using Number = float;
  using OnChip = uint32_t;  // as to_tf32 gives it
  using Sum = float;
  using Math = FastMath;
  static constexpr int kK = 8, kLaneColumns = 2;
  static __device__ __forceinline__ int lane_column(int lane) { return lane % 4 * 2; }
  static __device__ __forceinline__ int place(int i, int j) { return j * 2 + i % 2; }

  static __device__ __forceinline__ OnChip on_chip(Sum x) { return to_tf32(x); }
  static __device__ __forceinline__ OnChip keep(Number x) { return to_tf32(x); }
  static __device__ __forceinline__ void multiply(float (&sums)[kRowTiles][kSums], const uint4 (&weights)[kRowTiles],
                                                  const OnChip* operand, int lane) {
    const uint2 b = reinterpret_cast<const uint2*>(operand)[lane];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) mma_tf32(sums[m], weights[m], b);
  }
};

// float32 and float64 as they are: a lane has one row, and all 8 columns; the operand is read by all lanes at once.
template <class T, class TMath>
struct PlainTile {
  using Number = T;
  using OnChip = T;
  using Sum = T;
  using Math = TMath;
  static constexpr int kM = 32, kK = 16 / sizeof(T), kSums = kBatchColumns, kRowTiles = 1;
  static constexpr int kRegisterSteps = 16;
  static constexpr int kLaneRows = 1, kLaneColumns = kK;
  static __device__ __forceinline__ int lane_row(int lane) { return lane; }
  static __device__ __forceinline__ int lane_column(int) { return 0; }
  static __device__ __forceinline__ int place(int, int j) { return j; }

  static __device__ __forceinline__ void store(const T (&sums)[kRowTiles][kSums], T* to, int stride, int lane) {
#pragma unroll
    for (int n = 0; n < kSums; ++n) to[n * stride + lane] = sums[0][n];
  }

  static __device__ __forceinline__ OnChip on_chip(Sum x) { return x; }
  static __device__ __forceinline__ OnChip keep(Number x) { return x; }
  static __device__ __forceinline__ int sum_row(int lane, int) { return lane; }
  static __device__ __forceinline__ int sum_column(int, int n) { return n; }
  static __device__ __forceinline__ void multiply(T (&sums)[kRowTiles][kSums], const uint4 (&weights)[kRowTiles],
                                                  const OnChip* operand, int) {
    struct Numbers {
      T at[kK];
    };
    const Numbers a = bits_as<Numbers>(weights[0]);
#pragma unroll
    for (int n = 0; n < kBatchColumns; ++n) {
      const uint4 words = reinterpret_cast<const uint4*>(operand)[n];  // in one load: not by reference
      const Numbers b = bits_as<Numbers>(words);
#pragma unroll
      for (int k = 0; k < kK; ++k) sums[0][n] += a.at[k] * b.at[k];
    }
  }
};

using Fp32Tile = PlainTile<float, ExactMath>;
using Fp64Tile = PlainTile<double, DoubleMath>;

// Where element (k, n) of a whole operand lies in the kernels for all T: of each k tile the sequences, of each of these
// its kK numbers. Lane n * 4 + c of a warp reads numbers kLaneColumns * c and the following of sequence n.
template <class Tile, int kBatchTiles>
__device__ __forceinline__ int operand_place(int k, int n) {
  return (k / Tile::kK * kBatchTiles * kBatchColumns + n) * Tile::kK + k % Tile::kK;
}

}  // namespace lstm_ext::cuda
