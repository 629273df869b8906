#include "kernels.cuh"

namespace lstm_ext::cuda {

const KernelSet& tf32_kernels(int batch_tiles) {
  static constexpr KernelNames kNames = {"sequence_forward<TF32>", "sequence_backward<TF32>", "step_forward<TF32>",
                                         "step_backward<TF32>"};
  static const KernelSet sets[] = {
      kernel_set<Arithmetic::kTf32, Tf32Tile, 1>(kNames), kernel_set<Arithmetic::kTf32, Tf32Tile, 2>(kNames),
      kernel_set<Arithmetic::kTf32, Tf32Tile, 4>(kNames), kernel_set<Arithmetic::kTf32, Tf32Tile, 8>(kNames)};
  return sets[set_number(batch_tiles)];
}

}  // namespace lstm_ext::cuda
