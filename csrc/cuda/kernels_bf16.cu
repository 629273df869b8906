#include "kernels.cuh"

namespace lstm_ext::cuda {

const KernelSet& bf16_kernels(int batch_tiles) {
  static constexpr KernelNames kNames = {"sequence_forward<bfloat16>", "sequence_backward<bfloat16>",
                                         "step_forward<bfloat16>", "step_backward<bfloat16>"};
  static const KernelSet sets[] = {kernel_set<Arithmetic::kBf16, HalfTile<__nv_bfloat16>, 1>(kNames),
                                   kernel_set<Arithmetic::kBf16, HalfTile<__nv_bfloat16>, 2>(kNames),
                                   kernel_set<Arithmetic::kBf16, HalfTile<__nv_bfloat16>, 4>(kNames)};
  return sets[batch_tiles / 2];
}

}  // namespace lstm_ext::cuda
