// Where everything of a layer lies: which rows of the weights each block keeps, which tiles each warp multiplies, what
// stands where in a block's shared memory. Plain structs that the planner fills and the kernels read.
//
// A team is one or more blocks that work on the same sequences; its blocks are called ranks. Each rank owns some hidden
// units, and keeps the weights that make them on chip for all T. A step of the recurrence forward is
//
//   gates [4U, b]  =  W_hh [4U, P]  x  h [P, b]          U: the units of a rank, b: the sequences of a team
//                     own rows, on    all of it, put together from
//                     chip            what each rank has made
//
// and with a projection a second product follows, h [P / ranks, b] = W_hr x the units of all ranks. Backward the same
// two matrices are transposed, and come in the other order: see `Product`.
#pragma once

#include <cstdint>

namespace lstm_ext::cuda {

inline constexpr int kThreads = 256;  // of every block
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kBatchColumns = 8;  // sequences in a tile of the batch: the N of mma.sync m16n8k16
// Numbers between the end of a row of partial sums and the next: keeps the lanes of a warp on different banks.
inline constexpr int kPartialPadding = 4;
// Rows of the weights of which one warp has the sums, in the kernels that take a launch for each step.
inline constexpr int kStepRows = 32;

// The two products of a step. Without a projection there is only the first.
//
//               forward                              backward
// kRecurrent    gates = W_hh h                       dh = W_hh' d_gates, of the step after
// kProjection   h = W_hr hidden, of the same step    d_hidden = W_hr' dh, of the same step
enum class Product : int { kRecurrent, kProjection };

constexpr int number_of(Product which) { return static_cast<int>(which); }

// How blocks that work on the same sequences exchange what each has computed.
enum class Exchange : int {
  kBlock,    // the team is one block: shared memory
  kCluster,  // one cluster: stores into the others' shared memory, and a barrier there
  kGrid,     // blocks anywhere: words through L2 that carry the number of their exchange
};

// Where one sequence stands at step s of its walk through time.
struct Moment {
  int64_t t, t_before;  // of this step and the one before it (there is one if s > 0)
  bool active;          // the step is within the length
  bool last;            // the length ends with it
  bool forgets;         // a reset stands at it
  bool forgets_next;    // a reset stands at the one after it
};

// How the elements of a vector are divided among the ranks. In its own order the vector has `groups` (the gates i f g
// o, or one) of `limit` units each, `group_stride` apart. A rank has `width` units of every group, so that all four
// gates of a unit meet in one block. H = 5, the gates, and 2 ranks of 3 units:
//
//   position   0  1  2  3  4  5  6  7  8  9 10 11 | 12 13 14 15 16 17 18 19 20 21 22 23
//   element   i0 i1 i2 f0 f1 f2 g0 g1 g2 o0 o1 o2 | i3 i4  - f3 f4  - g3 g4  - o3 o4  -
//             rank 0                              | rank 1        (-: no such unit, zero)
//   index_of   0  1  2  5  6  7 10 11 12 15 16 17 |  3  4 -1  8  9 -1 13 14 -1 18 19 -1
//
// In the kernels with a launch for each step it is the blocks of a launch that the vector is divided among.
struct Slices {
  int width, groups, limit;
  int64_t group_stride;

  constexpr int per_rank() const { return width * groups; }
  // Which element of the vector stands at a position of the slices; -1 for none.
  constexpr int64_t index_of(int position) const {
    const int unit = position / per_rank() * width + position % width;
    return unit < limit ? position % per_rank() / width * group_stride + unit : -1;
  }
};

// One product on chip: weights [rows, columns], of which each rank keeps its slice of the rows, times a vector with as
// many elements as there are columns, which every rank has whole. Both are cut into tiles (tile.cuh), and these are
// divided among the 8 warps of a block: `warps_m` along the rows, kWarps / warps_m along the columns. Which warp takes
// which, for 6 row tiles, multiplied in pairs, 4 tiles of columns (k tiles), and warps_m = 2:
//
//              k tile 0  1  2  3      Each number is a step of that warp: a pair of row tiles times one k tile.
//   row tiles 0, 1    0  2  4  6      A warp's first steps keep their weights in registers, `shared_steps` more in
//             2, 3    1  3  5  7      shared memory. Warps 0 2 4 6 have sums of the same rows, which the pointwise
//             4, 5    0  2  4  6      part adds up in that order.
struct ProductLayout {
  Slices rows, columns;
  int64_t row_stride, column_stride;  // of the weights, in elements; filled in at the launch
  int row_tiles, k_tiles;             // of one rank's rows; of all columns
  int warps_m, shared_steps;
  int tiles_offset, operand_offset, operand_bytes;  // in shared memory; of one operand buffer
  int row_words;                                    // 32-bit words that a rank sends for a sequence
  int64_t words_offset;                             // in the exchange memory, in 64-bit words
};

// A team, and the shared memory of each of its blocks, from address 0 on:
//
//   tiles | operand (kCluster: 2) | the same with a projection | partial sums | outbox | state | moments | barriers
struct Layout {
  Exchange exchange;
  int ranks;         // blocks of a team
  int teams;         // of each direction; a team takes every teams-th batch of team_batch sequences
  int team_batch;    // sequences at a time, up to kBatchTiles * kBatchColumns of the kernel
  int num_products;  // 2 with a projection
  ProductLayout product[2];
  int partial_offset, partial_stride;  // sums of the warps: [kWarps / warps_m, sequences, partial_stride]
  int outbox_offset;                   // what is to be sent: [sequences, row_words]; none for kBlock
  int state_offset;                    // c, or its gradient: [sequences, units]
  int moments_offset;                  // of this step and the one before: [2, sequences]
  int barriers_offset;                 // kCluster: [products, 2]
  int shared_bytes;
  uint64_t* words;  // kGrid: zero at the launch; [direction, team, exchange_words]; filled in at the launch
  int64_t exchange_words;

  constexpr const ProductLayout& operator[](Product which) const { return product[number_of(which)]; }
};

// One product with a launch of its own: the weights come from global memory each time. A block takes warps_m *
// kStepRows of their rows, and warps_n * 8 * (batch tiles of the kernel) sequences; the other warps, and the blocks of
// a cluster, divide k. Blocks that divide k come first, then those along the rows, then those along the batch.
struct StepPart {
  Product product;
  int warps_m_log2, warps_n_log2;  // together 1, 2 or 3
  int k_blocks_log2, row_blocks;
  int width_log2;  // of rows.width
  Slices rows;

  constexpr int k_blocks() const { return 1 << k_blocks_log2; }
  constexpr int warps_n() const { return 1 << warps_n_log2; }
  constexpr int block_rows() const { return kStepRows << warps_m_log2; }
  constexpr int splits() const { return kWarps >> (warps_m_log2 + warps_n_log2); }
};

// The shared memory of a block that takes one step: the moments of this step and the next, where each row of weights
// and operand starts (8 bytes), and then, at step_work_offset, first the stages and later the sums of the warps.
inline constexpr int kStages = 3, kStageBytes = 128;  // of a row, in a stage

constexpr int step_rows_offset(int sequences) {
  return (2 * sequences * static_cast<int>(sizeof(Moment)) + 15) / 16 * 16;
}
constexpr int step_work_offset(int sequences, int rows) { return step_rows_offset(sequences) + (rows + sequences) * 8; }
constexpr int step_shared_bytes(int sequences, const StepPart& part, int sum_bytes) {
  const int rows = part.block_rows(), stages = kStages * (rows + sequences) * kStageBytes;
  const int sums = part.splits() * sequences * (rows + kPartialPadding) * sum_bytes;
  return step_work_offset(sequences, rows) + (stages > sums ? stages : sums);
}

}  // namespace lstm_ext::cuda
