#include "kernels.cuh"

namespace lstm_ext::cuda {

const KernelSet& fp32_kernels(int batch_tiles) {
  static constexpr KernelNames kNames = {"sequence_forward<float32>", "sequence_backward<float32>",
                                         "step_forward<float32>", "step_backward<float32>"};
  static const KernelSet sets[] = {kernel_set<Arithmetic::kFp32, Fp32Tile, 1>(kNames),
                                   kernel_set<Arithmetic::kFp32, Fp32Tile, 2>(kNames)};
  return sets[batch_tiles - 1];
}

}  // namespace lstm_ext::cuda
