// What each kernel is told: one plain struct, passed by value.
#pragma once

#include "../params.h"
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

// ---- One product of one step in a launch ----------------------------------------------------------------------

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
