#include "kernels.cuh"

namespace lstm_ext::cuda {

const KernelSet& bf16_kernels(int batch_tiles) {
  static constexpr KernelNames kNames = {"sequence_forward<bfloat16>", "sequence_backward<bfloat16>",
                                         "step_forward<bfloat16>", "step_backward<bfloat16>"};
  static const KernelSet sets[] = {kernel_set<Arithmetic::kBf16, HalfTile<__nv_bfloat16>, 1>(kNames),
                                   kernel_set<Arithmetic::kBf16, HalfTile<__nv_bfloat16>, 2>(kNames),
                                   kernel_set<Arithmetic::kBf16, HalfTile<__nv_bfloat16>, 4>(kNames),
                                   kernel_set<Arithmetic::kBf16, HalfTile<__nv_bfloat16>, 8>(kNames)};
  return sets[set_number(batch_tiles)];
}

}  // namespace lstm_ext::cuda
