#include "kernels.cuh"

namespace lstm_ext::cuda {

const KernelSet& fp64_kernels(int /*batch_tiles*/) {
  static constexpr KernelNames kNames = {"sequence_forward<float64>", "sequence_backward<float64>",
                                         "step_forward<float64>", "step_backward<float64>"};
  static const KernelSet sets[] = {kernel_set<Arithmetic::kFp64, Fp64Tile, 1>(kNames)};
  return sets[0];
}

}  // namespace lstm_ext::cuda
