// How the work of a kernel is spread over blocks, and where each thing lies in a block's shared memory: plain structs
// that the planner fills and the kernels read.
#pragma once

#include "../params.h"

namespace lstm_ext::cuda {

inline constexpr int kThreads = 256;  // of every block
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kColumns = 8;         // sequences in a column tile of a product
inline constexpr int kPartialPadding = 4;  // of a row of partial sums: keeps the lanes of a warp on different banks

// Where one sequence stands at step s of its walk through time.
struct Row {
  int64_t t, t_before;  // of this step and the one before it (there is one if s > 0)
  bool active;          // the step is within the length
  bool last;            // the length ends with it
  bool forgets;         // a reset stands at it
  bool forgets_next;    // a reset stands at the one after it
};

// How blocks that work on the same sequences exchange what each has computed.
enum class Exchange : int {
  kBlock,    // the team is one block: shared memory
  kCluster,  // one cluster: stores into the others' shared memory, and a barrier there
  kGrid,     // blocks anywhere: words through L2 that carry the number of their exchange
};

// The order of the numbers of a vector that ranks share out: rank after rank; of each rank `groups` (the gates, or one)
// of `width` units. Past `limit`, ranks hold zeros.
struct SharedOut {
  int width, groups, limit;
  int64_t group_stride;  // between the groups in the vector's own order

  constexpr int each() const { return width * groups; }
  // The place in the vector's own order, or -1 where there is none.
  constexpr int64_t place(int index) const {
    const int unit = index / each() * width + index % width;
    return unit < limit ? index % each() / width * group_stride + unit : -1;
  }
};

// One product of a step: weights [rows, columns], of which each rank keeps its rows on chip, times a vector of columns
// that all ranks have. Tiles of weights are shared out to the warps: `warps_m` of them along the rows, the others along
// the columns. The first tiles of each warp stay in registers, `shared_steps` more in shared memory.
struct Stage {
  SharedOut rows, columns;
  int64_t row_stride, column_stride;  // of the weights, in elements
  int row_tiles, column_tiles;        // of one rank's rows; of all columns
  int warps_m, shared_steps;
  int tiles_offset, operand_offset, operand_bytes;  // in shared memory; of one operand buffer
  int row_words;                                    // 32-bit words that a rank sends for a sequence
  int64_t words_offset;                             // in the exchange memory, in 64-bit words
};

struct Spread {
  Exchange exchange;
  int ranks;       // blocks of a team
  int teams;       // of each direction; a team takes every teams-th tile of the batch
  int batch_tile;  // sequences at a time, up to the columns of the kernel
  int num_stages;  // 2 with a projection
  Stage stage[2];
  int partial_offset, partial_stride;  // sums of the warps: [warps along the columns, columns, partial_stride]
  int outbox_offset, state_offset, rows_offset, barriers_offset;
  int shared_bytes;
  uint64_t* words;  // kGrid: zero at the launch; [direction, team, exchange_words]
  int64_t exchange_words;
};

struct SequenceForward {
  LayerForward layer;  // x is null: it comes as xw
  const void* xw[2];   // for each direction x W_ih', float or double, rows by gates_map; may be the array of gates
  Spread spread;
};

struct BackwardOutputs {
  void* d_gates;  // of the gates before their activation, rows by gates_map of LayerBackward, zero past a length
  void* h_prev;   // the h that each step started from, rows by h_map
  void* d_h;      // of h as each step made it; null without a projection; rows by h_map
  void* hidden;   // h before the projection; null without one; rows by hidden_map
};

struct BackwardPass {
  LayerBackward layer;  // x, dx and grads are not used
  BackwardOutputs outputs[2];
  RowMap d_gates_map, h_map, hidden_map;
};

struct SequenceBackward {
  BackwardPass pass;
  Spread spread;
};

// One launch of the path that takes a launch for each step, or two with a projection: the weights come from global
// memory each time, in blocks of `warps_m` * kStepRows of their rows.
inline constexpr int kStepRows = 32;

struct StepPart {
  int stage;    // 0: x and h to the gates; 1: the projection (backward: 0: to the gradient of h; 1: back through w_hr)
  int warps_m;  // 1, 2, 4 or 8
  int row_blocks;
  SharedOut rows;                     // those of one block by those of a rank
  int64_t row_stride, column_stride;  // of the recurrent weights, or those of the projection
};

struct StepForward {
  LayerForward layer;  // with x, w_ih is part of the product
  const void* xw[2];   // as in SequenceForward; null with x
  int64_t s;
  StepPart part;
  void* state;   // c between the steps, float or double [D, B, H]; null for a single step
  void* hidden;  // h before the projection [D, B, H]; null without one
};

struct StepBackward {
  BackwardPass pass;
  int64_t s;  // -1 for what remains after step 0: the gradients of the initial state
  StepPart part;
  void* state;  // the gradient of c between the steps, float or double [D, B, H]
};

}  // namespace lstm_ext::cuda
