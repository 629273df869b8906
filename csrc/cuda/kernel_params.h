// What each kernel is told: one plain struct, passed by value.
#pragma once

#include "../cell_math.h"
#include "layout.h"

namespace lstm_ext::cuda {

// ---- A whole layer in one launch ------------------------------------------------------------------------------

struct SequenceForward {
  LayerForward layer;  // x is null: it comes as xw
  const void* xw[2];   // for each direction x W_ih', float or double, rows by gates_map; may be the array of gates
  Layout layout;
};

struct BackwardOutputs {
  void* d_gates;  // of the gates before their activation, rows by gates_map of LayerBackward, zero past a length
  void* h_prev;   // the h that each step started from, rows by h_map; with a projection h0 alone, and zeros
  void* d_h;      // of h as each step made it; null without a projection; rows by h_map
  void* hidden;   // h before the projection; null without one; rows by hidden_map
  // What hidden was one step earlier, zero where a step started from h0; without a projection h_prev itself.
  void* hidden_prev;
};

struct BackwardPass {
  LayerBackward layer;  // x, dx and grads are not used
  BackwardOutputs outputs[2];
  RowMap d_gates_map, h_map, hidden_map;
};

struct SequenceBackward {
  BackwardPass pass;
  Layout layout;
};

// ---- A cell with options ---------------------------------------------------------------------------------------

// Its numbers in the type of the sums: a GPU takes long to convert a double.
template <class Sum>
struct CellNumbers {
  struct Spec {
    Activation kind;
    Sum alpha, beta;
  };
  Spec activation, recurrent_activation;
  Sum forget_bias, cell_clip, proj_clip, zoneout_h, zoneout_c;
  Sum h_scale, g_scale;  // of what recurrent and candidate dropout leave
};

// A unit keeps what it was with some probability; where nothing is drawn, in that proportion.
struct Zoneout {
  bool wanted, draws;
  Chance chance;
};

// Of a backward pass, for the gradients of a peephole: c as each step found it and as its gates left it, float or
// double, rows by hidden_map of BackwardPass; both may be null.
struct CellOutputs {
  void *c_prev, *c_new;
};

struct KernelCell {
  CellNumbers<float> single;
  CellNumbers<double> twice;
  bool coupled, tensorflow;
  bool draws;  // whether there are random numbers
  Zoneout zoneout_h, zoneout_c;
  Chance recurrent, candidate;  // what is dropped
  const int64_t* seed;          // may be null
  struct {
    Matrix peephole;  // [3, H], data may be null
    const void* y;    // backward: rows by y_map
    CellOutputs outputs;
  } direction[2];
  RowMap y_map;
  // Of the kernels with a launch for each step: forward two buffers [D, B, P], by turns, of h as the next step
  // multiplies it, null without recurrent dropout; backward what of the gradient of h goes past a step, float or double
  // [D, B, P], null without zoneout of h.
  void* h_state;
};

// The params of a kernel for cells with options.
template <class Params>
struct WithCell : Params {
  KernelCell cell;
};

// ---- One product of one step in a launch ----------------------------------------------------------------------

struct StepForward {
  LayerForward layer;  // with x, w_ih is part of the product
  const void* xw[2];   // as in SequenceForward; null with x
  int64_t s;           // -1, with recurrent dropout, for what comes before step 0: h0 as that multiplies it
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

// ---- A cell that normalises: in a launch for all T, or each step is a product, and then its rows, of a block each --

// What a product leaves, as it is: the sums of each row of the batch.
struct StepSums {
  SequenceShape shape;
  Masks masks;
  const int64_t* packed_offset;  // may be null
  int64_t s;
  StepPart part;
  int64_t columns;
  enum class Operand : int { kBefore, kThis, kAfter } operand;  // of which step, seen from s: zero where that has none
  RowMap operand_map;
  struct {
    bool reverse;
    Matrix weights;
    const void* operand;  // rows by operand_map; null: nothing is multiplied, and all sums are zero
  } direction[2];
  void* sums;  // float or double [D, B, 4H], the first of each row
};

struct KernelNorm {
  Norm kind;
  double epsilon;
  bool in_shared;  // where threads have several units: what these remember is in shared memory
  struct {
    Matrix gamma;  // as in LayerCell
    const void *beta, *gamma_h, *beta_h;
  } direction[2];
};

// With Norm::kRows xw is scaled and normalised already.
struct NormSequenceForward : WithCell<SequenceForward> {
  KernelNorm norm;
};

// The same for a step. `rows` are the sums of h, float or double [D, B, 4H], which the block of a row may overwrite.
struct NormForward : WithCell<StepForward> {
  KernelNorm norm;
  void* rows;
};

// Of what a row normalised, in the order of the weights, rows by d_gates_map: the sums of h (kRows) or whole ones. All
// are float or double, and zero past a length.
struct NormOutputs {
  void* normed;              // [.., 4H]; becomes its product with d_pre, of which the gradient of gamma is the sum
  const void* scales;        // 1 / deviation [.., 1] (kRows) or [.., 4], rows by scales_map
  void* d_pre;               // [.., 4H], the gradient of what normed becomes once it is scaled and shifted
  void *d_seen, *d_gamma_h;  // [.., H], of c as the output sees it, and that times the normalised c; may be null
};

// BackwardOutputs::d_gates are of what was normalised. `rows` [D, B, 4H] has the gradient of h, or with a projection of
// the hidden units, in the first H of each row.
struct NormBackward : WithCell<StepBackward> {
  KernelNorm norm;
  void* rows;
  RowMap scales_map;
  NormOutputs normed[2];
};

struct NormSequenceBackward : WithCell<SequenceBackward> {
  KernelNorm norm;
  RowMap scales_map;
  NormOutputs normed[2];
};

// h as each of the first `steps` steps found it and multiplied it.
struct StepsBefore {
  SequenceShape shape;
  Masks masks;
  const int64_t* packed_offset;  // may be null
  int64_t steps;
  RowMap h_map;
  struct {
    bool reverse;
    InitialState state;
    void* h;  // rows by h_map, zero past a length
  } direction[2];
};

}  // namespace lstm_ext::cuda
