// The kernels that are compiled: one set for each kind of arithmetic and number of batch tiles in a block.
#pragma once

#include "kernel_params.h"
#include "launch.h"

namespace lstm_ext::cuda {

template <class SequenceForward, class SequenceBackward, class StepForward, class StepBackward>
struct Kernels {
  // By Exchange.
  Kernel<SequenceForward> sequence_forward[3];
  Kernel<SequenceBackward> sequence_backward[3];
  Kernel<StepForward> step_forward;
  Kernel<StepBackward> step_backward;
};
struct KernelSet : Kernels<SequenceForward, SequenceBackward, StepForward, StepBackward> {};

// Of cells with options. One kernel of a pass exchanges in any way; it has a name for each, as each is checked.
struct CellKernelSet
    : Kernels<WithCell<SequenceForward>, WithCell<SequenceBackward>, WithCell<StepForward>, WithCell<StepBackward>> {};

// `batch_tiles` is 1, 2, 4 or 8, up to most_step_tiles of the arithmetic; beyond most_batch_tiles a set has no kernels
// for all T.
const KernelSet& bf16_kernels(int batch_tiles);
const KernelSet& fp16_kernels(int batch_tiles);
const KernelSet& tf32_kernels(int batch_tiles);
const KernelSet& fp32_kernels(int batch_tiles);
const KernelSet& fp64_kernels(int batch_tiles);

// Those for all T have one batch tile, those for a step as many as cell_step_tiles of plan.h says; these are of weights
// in torch's layout or in TensorFlow's.
const CellKernelSet& bf16_cell_kernels(bool tensorflow);
const CellKernelSet& fp16_cell_kernels(bool tensorflow);
const CellKernelSet& tf32_cell_kernels(bool tensorflow);
const CellKernelSet& fp32_cell_kernels(bool tensorflow);
const CellKernelSet& fp64_cell_kernels(bool tensorflow);

// Of cells that normalise: those for all T, and those for a step. There the product is of weights that lie as [rows,
// columns] or transposed; projections, and the gradient of h0, are left to the kernels for a step of a CellKernelSet.
struct NormKernelSet {
  Kernel<NormSequenceForward> sequence_forward[3];  // by Exchange, as those of a CellKernelSet
  Kernel<NormSequenceBackward> sequence_backward[3];
  Kernel<StepSums> sums[2];
  Kernel<NormForward> forward;
  Kernel<NormBackward> backward;
  Kernel<WithCell<StepsBefore>> h_before;
};

// For one norm and one layout of the weights, of which kernels are told: they have names of their own, as each is
// checked.
const NormKernelSet& bf16_norm_kernels(Norm norm, bool tensorflow);
const NormKernelSet& fp16_norm_kernels(Norm norm, bool tensorflow);
const NormKernelSet& tf32_norm_kernels(Norm norm, bool tensorflow);
const NormKernelSet& fp32_norm_kernels(Norm norm, bool tensorflow);
const NormKernelSet& fp64_norm_kernels(Norm norm, bool tensorflow);

}  // namespace lstm_ext::cuda
