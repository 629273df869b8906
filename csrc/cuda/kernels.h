// The kernels that are compiled: one set for each kind of arithmetic and number of column tiles of the batch.
#pragma once

#include "launch.h"
#include "plan.h"

namespace lstm_ext::cuda {

struct KernelSet {
  Kernel<SequenceForward> sequence_forward;
  Kernel<SequenceBackward> sequence_backward;
  Kernel<StepForward> step_forward;
  Kernel<StepBackward> step_backward;
  int64_t (*step_shared_bytes)(int warps_m);
};

// `column_tiles` is 1, 2 or 4, up to most_column_tiles of the arithmetic.
const KernelSet& bf16_kernels(int column_tiles);
const KernelSet& fp16_kernels(int column_tiles);
const KernelSet& tf32_kernels(int column_tiles);
const KernelSet& fp32_kernels(int column_tiles);
const KernelSet& fp64_kernels(int column_tiles);

}  // namespace lstm_ext::cuda
