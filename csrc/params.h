// What a kernel is told: plain structs, no framework. Strides count elements. A pointer marked "may be null" stands,
// unless it says otherwise, for zeros on input and for "not wanted" on output. No output may alias an input.
#pragma once

#include <cstdint>

namespace lstm_ext {

enum class Dtype : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Where the row of time t and batch entry b starts. Packed sequences hold only the valid rows:
// those of time t start at row packed_offset[t].
struct RowMap {
  int64_t t_stride, b_stride;
  const int64_t* packed_offset;  // [T], may be null: padded

  constexpr int64_t at(int64_t t, int64_t b) const { return from_start(packed_offset ? packed_offset[t] : t, b); }
  // `start` is packed_offset[t] where that is given, else t.
  constexpr int64_t from_start(int64_t start, int64_t b) const { return start * start_stride() + b * b_stride; }
  constexpr int64_t start_stride() const { return packed_offset ? b_stride : t_stride; }
};

struct Matrix {
  const void* data;
  int64_t row_stride;  // columns are contiguous
};

struct SequenceShape {
  int64_t T, B, I, H;
  int64_t P;       // width of h: H without a projection
  bool projected;  // w_hr is given
};

// Which rows exist, and where the state is forgotten.
struct Masks {
  const int64_t* lengths;  // [B], each 0..T, may be null: all T
  const uint8_t* resets;   // 0 or 1 at resets[t * reset_t_stride + b * reset_b_stride], may be null
  int64_t reset_t_stride, reset_b_stride;
};

// What the matrices of a frozen layer of float32 may be stored as: as all else is, or narrower. int8 numbers are
// multiplied by the scale of their row.
enum class Storage : uint8_t { kPlain, kBFloat16, kInt8 };

struct RowScales {  // null where there are none
  const float *w_ih, *w_hh, *w_hr;
};

struct LayerWeights {
  Matrix w_ih;              // [4H, I]
  Matrix w_hh;              // [4H, P]
  const void *b_ih, *b_hh;  // [4H], both may be null
  Matrix w_hr;              // [P, H], data may be null
  RowScales scales = {};    // [4H], [4H], [P]
};

// ---- what a cell computes where it is no plain LSTM: `Cell` in lstm_ext/cell.py, with the same numbers ----

enum class Activation : uint8_t {
  kTanh,
  kSigmoid,
  kHardSigmoid,
  kRelu,
  kLeakyRelu,
  kElu,
  kSoftsign,
  kSoftplus,
  kLinear
};
enum class Norm : uint8_t { kNone, kRows, kGates };

struct ActivationSpec {
  Activation kind;
  double alpha, beta;
};

struct Cell {
  ActivationSpec activation, recurrent_activation;  // of g and the output; of i, f, o
  double forget_bias;
  bool coupled;                 // i = 1 - f
  double cell_clip, proj_clip;  // 0: none
  bool peephole;
  Norm norm;
  double norm_epsilon;
  double zoneout_h, zoneout_c, recurrent_dropout, candidate_dropout;
  bool training;
  // w_ih is [I, 4H] and w_hh [H, 4H], rows of one matrix, their gradients too; gates are in the order i, g, f, o; b_hh
  // is null.
  bool tensorflow;
  uint64_t seed;
};

// With what a direction has for it, beside what every layer has.
struct LayerCell {
  Cell options;
  struct {
    Matrix peephole;  // [3, H] of i, f, o; data is null where there is none
    // With Norm::kRows gamma is [2, 4H], of x and of h; with kGates it is [4H], as beta. Gates in the order i f g o.
    Matrix gamma;
    const void *beta, *gamma_h, *beta_h;                         // [4H], [H], [H]
    const void* y;                                               // backward: of the forward pass, rows by y_map
    void *d_peephole, *d_gamma, *d_beta, *d_gamma_h, *d_beta_h;  // backward: contiguous, may be null
  } direction[2];
  RowMap y_map;
  const int64_t* seed;  // on a GPU, where options.seed is not read; null where nothing is drawn
};

// ---- a layer ----------------------------------------------------------------------------------------------

struct InitialState {
  Matrix h0, c0;  // [B, P], [B, H]; data may be null
};

struct ForwardDirection {
  bool reverse;
  LayerWeights weights;
  InitialState state;
  void* y;      // rows by LayerForward::y_map
  void* h_n;    // [B, P], contiguous, may be null
  void* c_n;    // [B, H], contiguous
  void* cells;  // rows by cells_map, float or double, may be null
  void* gates;  // rows by gates_map, activated i f g o, may be null
  // Of a frozen layer, on the CPU: its weights as cpu::Kernels::pack has left them; null: they are packed in the call,
  // or read in place.
  void* packed = nullptr;
  float h_bound = 1;  // with Storage::kInt8: no element of a computed h is larger
};

struct LayerForward {
  Dtype dtype;
  SequenceShape shape;
  Masks masks;
  const void* x;
  RowMap x_map, y_map, cells_map, gates_map;
  int num_directions;
  ForwardDirection direction[2];
  int num_threads;
  const LayerCell* cell;  // null: the plain LSTM
  Storage storage = Storage::kPlain;
};

struct WeightGrads {  // contiguous
  bool wanted;
  void *w_ih, *w_hh;         // [4H, I], [4H, P]
  void *b_ih, *b_hh, *w_hr;  // [4H], [4H], [P, H]; null where the layer has none
};

struct BackwardDirection {
  bool reverse;
  LayerWeights weights;
  InitialState state;
  const void *cells, *gates;  // what the forward pass left
  const void* dy;             // rows by dy_map, may be null
  const void* d_cells;        // rows by d_cells_map, float or double, may be null
  Matrix dh_n, dc_n;          // [B, P], [B, H]; data may be null
  void *dh0, *dc0;            // [B, P], [B, H], contiguous, may be null
  WeightGrads grads;
};

struct LayerBackward {
  Dtype dtype;
  SequenceShape shape;
  Masks masks;
  const void* x;
  void* dx;  // rows by dx_map, may be null
  RowMap x_map, dx_map, dy_map, cells_map, d_cells_map, gates_map;
  int num_directions;
  BackwardDirection direction[2];
  int num_threads;
  const LayerCell* cell;  // null: the plain LSTM
};

}  // namespace lstm_ext
