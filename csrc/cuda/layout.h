// Where everything of a layer lies: which rows of the weights each block keeps, which tiles each warp multiplies, what
// stands where in a block's shared memory. Plain structs that the planner fills and the kernels read.
//
// A team is one or more blocks that work on the same sequences; its blocks are called ranks. Each rank owns some hidden
// units, and keeps the weights of their gates on chip for all T.
//
//   forward    gates [4U, b]  =  W_hh [4U, P]   x  h [P, b]             U: the units of a rank, b: the sequences of a
//                                own rows          of all ranks         team. What ranks make is gathered by all.
//
//   backward   dh [P, b]      =  W_hh' [P, 4U]  x  d_gates [4U, b]      The transpose of the same weights makes a part
//              a part of each    own columns       of this rank         of every dh, which its owner adds up.
//
// With a projection a second product follows forward, h = W_hr hidden, and comes first backward, d_hidden = W_hr' dh.
#pragma once

#include <cstdint>

namespace lstm_ext::cuda {

inline constexpr int kThreads = 256;  // of every block
inline constexpr int kWarpsLog2 = 3, kWarps = 1 << kWarpsLog2;
static_assert(kWarps == kThreads / 32);
inline constexpr int kBatchColumns = 8;  // sequences in a tile of the batch: the N of mma.sync m16n8k16
inline constexpr int kGroupRows = 32;    // rows of the weights that a warp multiplies at a time
// Numbers between the end of a row of partial sums and the next: keeps the lanes of a warp on different banks.
inline constexpr int kPartialPadding = 4;
// Where so many threads have all items of a step, the others read what other blocks send.
inline constexpr int kEarlyThreads = 64;
// So many times 16 bytes from other blocks a thread of a backward pass waits for at a time.
inline constexpr int kMailInFlight = 4;
// Pointers to where a step stores what it makes of a sequence (pointwise.cuh).
inline constexpr int kRowsBytes = 24;
// Of so many steps the moments are found at a time, with those of the steps before and after them.
inline constexpr int kMomentSteps = 16, kMoments = kMomentSteps + 2;
// In the kernels that take a launch for each step: rows of the weights of which one warp has the sums, and the most
// sequences of a block.
inline constexpr int kStepRows = 32, kMostStepSequences = 128;

// Threads of a block that has one row of a cell that normalises, and how many sums over a row it adds up at a time, in
// shared memory. What units remember follows there, where a thread has several and there is room.
inline constexpr int kMostRowThreads = 512, kMostRowWarps = kMostRowThreads / 32, kMostRowSums = 8;
constexpr int most_row_threads(int sum_bytes) { return sum_bytes == 8 ? kMostRowThreads / 2 : kMostRowThreads; }
constexpr int row_threads(int64_t units, int sum_bytes) {
  const int most = most_row_threads(sum_bytes);  // doubles take twice as many registers
  return units >= most ? most : static_cast<int>((units + 31) / 32 * 32);
}
constexpr int row_sums_bytes(int sum_bytes) { return 2 * kMostRowWarps * kMostRowSums * sum_bytes; }
constexpr int64_t row_memory_bytes(int64_t units, int threads, int sum_bytes) {
  return units > threads ? 4 * units * sum_bytes : 0;
}

// Rows of float or double that a backward pass copies for a step of a sequence: c, d_cells, and of such a cell in a
// launch for all T what was normalised of the four gates.
inline constexpr int kCellRows = 2, kNormCellRows = 6;

// Of such cells in a launch for all T: what ranks tell each other of a row at a time; the weights of a unit, and what
// is known of one backward.
inline constexpr int kRowNumbers = 8, kNormUnitNumbers = 12, kNormKnownNumbers = 8;

// Division by a number that the planner knows, as a multiplication: of n, where n times the number is at most 2^32.
struct Divisor {
  int value = 1;
  uint64_t inverse = uint64_t{1} << 32;

  constexpr Divisor() = default;
  constexpr explicit Divisor(int of)
      : value(of), inverse(((uint64_t{1} << 32) + static_cast<uint64_t>(of) - 1) / static_cast<uint64_t>(of)) {}
  constexpr int quotient(int n) const { return static_cast<int>(static_cast<uint64_t>(n) * inverse >> 32); }
};

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
  kGrid,     // blocks anywhere: numbers through L2 that tell of which exchange they are
  kAny,      // of a kernel that reads it from its Layout
};

// Where one sequence stands at step s of its walk through time. `start` stands for a time: the number of the first row
// of that time in a packed sequence, else the time itself.
struct Moment {
  int64_t start, start_before, start_after;  // of this step, and of those before and after it where there are some
  uint32_t flags;                            // together, as each is needed in every step

  constexpr bool active() const { return flags & 1; }         // the step is within the length
  constexpr bool last() const { return flags & 2; }           // the length ends with it
  constexpr bool follows() const { return flags & 4; }        // the step before it is within the length too
  constexpr bool forgets() const { return flags & 8; }        // a reset stands at it
  constexpr bool forgets_next() const { return flags & 16; }  // a reset stands at the one after it
};

// How the elements of a vector are divided among the ranks: each has `width` units, and of a unit all that belongs to
// it (the gates i f g o, or one number), so that a unit's gates meet in one block. In its own order the vector has
// `groups` of `limit` units each, `group_stride` apart. H = 5, the gates, and 2 ranks of 3 units:
//
//   position   0  1  2  3  4  5  6  7  8  9 10 11 | 12 13 14 15 16 17 18 19 20 21 22 23
//   element   i0 f0 g0 o0 i1 f1 g1 o1 i2 f2 g2 o2 | i3 f3 g3 o3 i4 f4 g4 o4  -  -  -  -
//             rank 0                              | rank 1              (-: no such unit, zero)
//   index_of   0  5 10 15  1  6 11 16  2  7 12 17 |  3  8 13 18  4  9 14 19 -1 -1 -1 -1
struct Share {
  int width, groups, limit;
  int64_t group_stride;
  Divisor items, pieces;  // a rank's width in units that one thread takes together, and in those of 16 bytes

  constexpr int per_rank() const { return width * groups; }
  // Which element of the vector stands at a position; -1 for none.
  constexpr int64_t index_of(int position) const {
    const int unit = groups == 4 ? position >> 2 : position, group = groups == 4 ? position & 3 : 0;
    return unit < limit ? group * group_stride + unit : -1;
  }
};

// Of the random numbers of a row at a time, by Draw.
struct DrawKeys {
  uint64_t of[4];
};

// In the kernels with a launch for each step: how the elements are divided among the blocks, gate after gate in each.
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

// One product on chip. Its rows are divided into groups of 32, its columns into tiles (tile.cuh); both are divided
// among the 8 warps of a block, 2^log_warps_m along the rows. Which warp takes which, for 3 row groups, 4 tiles of
// columns (k tiles) and log_warps_m = 1:
//
//                k tile 0  1  2  3      Each is a step of that warp: a row group times one k tile. It takes those of
//   row group 0       0  0  2  2 *      one group after another. The first keep their weights in registers,
//             1       1  1  3  3        `shared_steps` more in shared memory. Warps 0 and 2 have sums of the same
//             2       0  0  2  2        rows: the split sums of a row are added up later, in that order.
//
// `run` k tiles of a group are in registers together: all of a warp's, or 16 where it has more. The kernels have
// straight code for each run that there is.
struct ProductLayout {
  Share rows, columns;
  int64_t row_stride, column_stride;  // of the weights, in elements; filled in at the launch
  int row_groups;
  int k_tiles;  // of the operand: those of all warps
  int log_warps_m;
  int warp_k_tiles, run;
  int shared_steps;
  int partial_stride;                               // of the sums, from one sequence to the next
  int tiles_offset, operand_offset, operand_bytes;  // in shared memory; of one operand buffer
  int inbox_offset, inbox_bytes;  // backward, kCluster: of one buffer of what others have sent; kGrid:
                                  // of the sums of what groups of ranks have sent
  int mail_groups;                // backward, kGrid: so many groups
  Divisor mail_pieces;            // and so many pieces of 16 bytes one rank sends another
  int64_t mail_offset;            // kGrid: in a team's exchange memory, in bytes
};

// So long a block waits for another. Where all blocks run, an exchange takes microseconds; but somebody may be looking
// on with a debugger.
inline constexpr uint64_t kMostNanoseconds = 10'000'000'000;

// What a kernel leaves in memory of the host when it gives up waiting; `kernel` is null before.
struct Timeout {
  const char* kernel;  // Layout::kernel
  int block, rank, exchange;
};

// A team, and the shared memory of each of its blocks, from address 0 on:
//
//   tiles | operand (forward, kCluster: 2) | inbox (backward, kCluster: 2, kGrid: 1) | the same with a projection
//   | partial sums | bias | what the next steps read: 3 times | state | cells | moments | where they store | barriers
//   with options    | keys of random numbers | peepholes | what is kept of h
//   and normalised  | weights of the units | what is known of each, backward | inbox of rows (kCluster: 2)
struct Layout {
  Exchange exchange;
  int ranks;         // blocks of a team
  int teams;         // of each direction; a team takes every teams-th batch of team_batch sequences
  int team_batch;    // sequences at a time, up to kBatchTiles * kBatchColumns of the kernel
  int num_products;  // 2 with a projection
  ProductLayout product[2];
  Divisor units;                      // a rank's hidden units in those that one thread takes together
  int partial_offset;                 // sums of the warps of one product: [split, sequences, its partial_stride]
  int bias_offset;                    // forward: [units], 4 gates each
  int inputs_offset, inputs_bytes;    // of one buffer: for each sequence the rows of 4 gates, backward of c, d_cells,
                                      // where they are normalised 4 of their sums, and dy
  int gate_row, cell_row, h_row;      // bytes of these rows
  Divisor input_pieces, gate_pieces;  // 16 bytes each, of all rows of a sequence, and of one of a gate
  int state_offset;                   // c, or its gradient: [sequences, units]
  int cells_offset;                   // backward, or of a cell that normalises: c of this step [sequences, units]
  int moments_offset;                 // [kMoments, team_batch]
  int rows_offset;                    // where each of these steps stores [kMoments, team_batch]
  int barriers_offset;                // kCluster: [products and one more, 2]
  int shared_bytes;
  int log_rows;  // kGrid forward: rows of a k tile in the exchange memory
  char* mail;    // kGrid: zero at the launch; [direction, team, exchange_bytes]; filled in at the launch
  int64_t exchange_bytes;
  Timeout* timeout;         // filled in at the launch
  const char* kernel;       // its name, of the host
  int peephole_offset;      // of cells with options: [units], 4 numbers each
  int h_state_offset;       // and what is kept of h, or of its gradient, from step to step: [sequences, units of h]
  int draw_keys_offset;     // and of random numbers [kMomentSteps, team_batch], where it draws some
  int norm_offset;          // of cells that normalise: [units], kNormUnitNumbers each
  int norm_known_offset;    // backward [sequences, units], kNormKnownNumbers each
  int row_inbox_offset;     // kCluster: what ranks have sent of rows [2, ranks, team_batch, kRowNumbers]
  int64_t row_mail_offset;  // kGrid: the same, in a team's exchange memory

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
  constexpr int splits_log2() const { return kWarpsLog2 - warps_m_log2 - warps_n_log2; }
  constexpr int splits() const { return 1 << splits_log2(); }
};

// Blocks of such a launch that a multiprocessor is to hold at a time: two, where 128 registers are enough for the sums
// and what goes with them. From sm_100 on they are not for numbers of 4 bytes, and nowhere for two batch tiles without
// tensor cores.
constexpr int step_blocks(int row_tiles, int batch_tiles, int number_bytes, int compute_capability) {
  const bool few_sums = batch_tiles < (row_tiles == 2 ? 8 : 2);
  return few_sums && number_bytes <= (compute_capability >= 100 ? 2 : 4) ? 2 : 1;
}

// The shared memory of a block that takes one step: what is known of each sequence (`known` bytes: its moment, backward
// and for a product by itself that of the next step too, and where its rows in memory are), where each row of weights
// and operand starts (8 bytes), and then, at step_work_offset, first the stages and later the sums of the warps.
inline constexpr int kStages = 3, kStageBytes = 128;  // of a row, in a stage
inline constexpr int kStepForwardKnown = 64, kStepBackwardKnown = 128;

constexpr int step_work_offset(int sequences, int known, int rows) {
  return sequences * known + (rows + sequences) * 8;
}
constexpr int step_shared_bytes(int sequences, int known, const StepPart& part, int sum_bytes) {
  const int rows = part.block_rows(), stages = kStages * (rows + sequences) * kStageBytes;
  const int sums = part.splits() * sequences * (rows + kPartialPadding) * sum_bytes;
  return step_work_offset(sequences, known, rows) + (stages > sums ? stages : sums);
}

}  // namespace lstm_ext::cuda
