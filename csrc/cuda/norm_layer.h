// The steps of a cell that normalises: a product of all rows, and then the rows, each in a launch.
#pragma once

#include "kernel_params.h"
#include "plan.h"

namespace lstm_ext::cuda {

KernelNorm kernel_norm(const LayerCell& cell, const Plan& plan);

// All steps, of params in which `s` and `part` are filled in here.
void norm_layer_forward(NormForward params, const Plan& plan, void* stream);
void norm_layer_backward(NormBackward params, const Plan& plan, void* stream);

// The launch of a kernel that finds h before steps.
LaunchConfig config_before(const StepsBefore& params, int directions, Arithmetic arithmetic);

}  // namespace lstm_ext::cuda
