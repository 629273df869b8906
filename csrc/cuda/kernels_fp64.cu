#include "kernels.cuh"

namespace lstm_ext::cuda {

const KernelSet& fp64_kernels(int /*batch_tiles*/) {
  static const KernelSet sets[] = {kernel_set<Arithmetic::kFp64, Fp64Tile, 1>("float64")};
  return sets[0];
}

}  // namespace lstm_ext::cuda
