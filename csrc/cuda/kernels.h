// The kernels that are compiled: one set for each kind of arithmetic and number of batch tiles in a block.
#pragma once

#include "kernel_params.h"
#include "launch.h"

namespace lstm_ext::cuda {

struct KernelSet {
  // By Exchange.
  Kernel<SequenceForward> sequence_forward[3];
  Kernel<SequenceBackward> sequence_backward[3];
  Kernel<StepForward> step_forward;
  Kernel<StepBackward> step_backward;
};

// `batch_tiles` is 1, 2, 4 or 8, up to most_step_tiles of the arithmetic; beyond most_batch_tiles a set has no kernels
// for all T.
const KernelSet& bf16_kernels(int batch_tiles);
const KernelSet& fp16_kernels(int batch_tiles);
const KernelSet& tf32_kernels(int batch_tiles);
const KernelSet& fp32_kernels(int batch_tiles);
const KernelSet& fp64_kernels(int batch_tiles);

}  // namespace lstm_ext::cuda
