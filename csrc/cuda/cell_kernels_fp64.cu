#include "kernels.cuh"

namespace lstm_ext::cuda {

const CellKernelSet& fp64_cell_kernels(bool tensorflow) {
  static const CellKernelSet sets[] = {cell_kernel_set<Arithmetic::kFp64, Fp64Tile, false>("float64"),
                                       cell_kernel_set<Arithmetic::kFp64, Fp64Tile, true>("float64")};
  return sets[tensorflow];
}

}  // namespace lstm_ext::cuda
