#include "kernels.cuh"

namespace lstm_ext::cuda {

const CellKernelSet& tf32_cell_kernels(bool tensorflow) {
  static const CellKernelSet sets[] = {cell_kernel_set<Arithmetic::kTf32, Tf32Tile, false>("TF32"),
                                       cell_kernel_set<Arithmetic::kTf32, Tf32Tile, true>("TF32")};
  return sets[tensorflow];
}

}  // namespace lstm_ext::cuda
