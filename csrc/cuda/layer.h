// A layer on a GPU, one or both directions of it: planned once, and launched on a stream as often as it runs.
#pragma once

#include <memory>
#include <optional>

#include "kernel_params.h"
#include "plan.h"

namespace lstm_ext::cuda {

// What the plan of a layer depends on, beside its shape.
struct LayerOptions {
  Dtype dtype;
  bool tf32;                         // float32 may be multiplied as TF32, where the device can
  std::optional<Strategy> strategy;  // forces one; empty chooses
};

// For the current device, whose number `device` is. The latest plans are kept: the same problem is solved once.
std::shared_ptr<const Plan> plan_layer(const SequenceShape& shape, int directions, bool backward,
                                       const LayerOptions& options, int device);

// The registers of a thread of the kernel that the plan runs.
int plan_registers(const Plan& plan);

// The plan is one for this shape, these directions, this pass and the current device. `workspace` has its
// workspace_bytes, aligned to 16. x W_ih' comes as xw, for each direction, rows by gates_map. A cell, one step without
// masks by Strategy::kStep, has layer.x instead, but no h_n and no workspace.
void layer_forward(const LayerForward& layer, const void* const (&xw)[2], const Plan& plan, void* workspace,
                   void* stream);
void layer_backward(const BackwardPass& pass, const Plan& plan, void* workspace, void* stream);

}  // namespace lstm_ext::cuda
