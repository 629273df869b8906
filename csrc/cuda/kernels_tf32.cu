#include "kernels.cuh"

namespace lstm_ext::cuda {

const KernelSet& tf32_kernels(int batch_tiles) {
  static const KernelSet sets[] = {
      kernel_set<Arithmetic::kTf32, Tf32Tile, 1>("TF32"), kernel_set<Arithmetic::kTf32, Tf32Tile, 2>("TF32"),
      kernel_set<Arithmetic::kTf32, Tf32Tile, 4>("TF32"), kernel_set<Arithmetic::kTf32, Tf32Tile, 8>("TF32")};
  return sets[set_number(batch_tiles)];
}

}  // namespace lstm_ext::cuda
