#include "kernels.cuh"

namespace lstm_ext::cuda {

const KernelSet& fp16_kernels(int batch_tiles) {
  static constexpr KernelNames kNames = {"sequence_forward<float16>", "sequence_backward<float16>",
                                         "step_forward<float16>", "step_backward<float16>"};
  static const KernelSet sets[] = {kernel_set<Arithmetic::kFp16, HalfTile<__half>, 1>(kNames),
                                   kernel_set<Arithmetic::kFp16, HalfTile<__half>, 2>(kNames),
                                   kernel_set<Arithmetic::kFp16, HalfTile<__half>, 4>(kNames),
                                   kernel_set<Arithmetic::kFp16, HalfTile<__half>, 8>(kNames)};
  return sets[set_number(batch_tiles)];
}

}  // namespace lstm_ext::cuda
