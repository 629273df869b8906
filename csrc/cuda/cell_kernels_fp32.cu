#include "kernels.cuh"

namespace lstm_ext::cuda {

const CellKernelSet& fp32_cell_kernels(bool tensorflow) {
  static const CellKernelSet sets[] = {cell_kernel_set<Arithmetic::kFp32, Fp32Tile, false>("float32"),
                                       cell_kernel_set<Arithmetic::kFp32, Fp32Tile, true>("float32")};
  return sets[tensorflow];
}

}  // namespace lstm_ext::cuda
