#include "kernels.cuh"

namespace lstm_ext::cuda {

const CellKernelSet& bf16_cell_kernels(bool tensorflow) {
  static const CellKernelSet sets[] = {cell_kernel_set<Arithmetic::kBf16, HalfTile<__nv_bfloat16>, false>("bfloat16"),
                                       cell_kernel_set<Arithmetic::kBf16, HalfTile<__nv_bfloat16>, true>("bfloat16")};
  return sets[tensorflow];
}

}  // namespace lstm_ext::cuda
