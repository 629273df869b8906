#include "kernels.cuh"

namespace lstm_ext::cuda {

const CellKernelSet& fp16_cell_kernels(bool tensorflow) {
  static const CellKernelSet sets[] = {cell_kernel_set<Arithmetic::kFp16, HalfTile<__half>, false>("float16"),
                                       cell_kernel_set<Arithmetic::kFp16, HalfTile<__half>, true>("float16")};
  return sets[tensorflow];
}

}  // namespace lstm_ext::cuda
