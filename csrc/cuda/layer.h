// A layer on a GPU, one or both directions of it: planned once, and launched on a stream as often as it runs.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "kernel_params.h"
#include "plan.h"

namespace lstm_ext::cuda {

// What the plan of a layer depends on, beside its shape.
struct LayerOptions {
  Dtype dtype;
  bool tf32;  // float32 may be multiplied as TF32, where the device can
  Forced forced;
  std::optional<CellTraits> cell;  // none: the plain LSTM
};

// For the current device, whose number `device` is. The latest plans are kept: the same problem is solved once.
std::shared_ptr<const Plan> plan_layer(const SequenceShape& shape, int directions, bool backward,
                                       const LayerOptions& options, int device);

// The kernel that the plan runs: its name, and the registers of a thread.
const char* plan_kernel(const Plan& plan);
int plan_registers(const Plan& plan);

// What was found out about a kernel of a device, for all plans to come: what is wrong with it; empty: nothing.
void set_verdict(const Plan& plan, const std::string& wrong);

// Times that were measured on a device, for all plans to come.
void set_measured(int device, std::vector<MeasuredTimes> measured);

// Of the backward pass of a cell with options, by direction. The latter two are of one that normalises.
struct BackwardCellArrays {
  CellOutputs cells[2];
  NormOutputs normed[2];
  RowMap scales_map;
};

// The plan is one for this shape, these directions, this pass and the current device. `workspace` has its
// workspace_bytes, aligned to 16. x W_ih' comes as xw, for each direction, rows by gates_map. A cell, one step without
// masks by Strategy::kStep, has layer.x instead, but no h_n and no workspace.
void layer_forward(const LayerForward& layer, const void* const (&xw)[2], const Plan& plan, void* workspace,
                   void* stream);
void layer_backward(const BackwardPass& pass, const BackwardCellArrays& arrays, const Plan& plan, void* workspace,
                    void* stream);

// h as each step found it and multiplied it, for the backward pass of a cell that normalises.
void layer_h_before(const StepsBefore& steps, const LayerCell& cell, Arithmetic arithmetic, int directions,
                    void* stream);

}  // namespace lstm_ext::cuda
