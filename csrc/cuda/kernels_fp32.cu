#include "kernels.cuh"

namespace lstm_ext::cuda {

const KernelSet& fp32_kernels(int batch_tiles) {
  static const KernelSet sets[] = {kernel_set<Arithmetic::kFp32, Fp32Tile, 1>("float32"),
                                   kernel_set<Arithmetic::kFp32, Fp32Tile, 2>("float32")};
  return sets[batch_tiles - 1];
}

}  // namespace lstm_ext::cuda
