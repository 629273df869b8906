#include "kernels.cuh"

namespace lstm_ext::cuda {

const KernelSet& bf16_kernels(int batch_tiles) {
  static const KernelSet sets[] = {kernel_set<Arithmetic::kBf16, HalfTile<__nv_bfloat16>, 1>("bfloat16"),
                                   kernel_set<Arithmetic::kBf16, HalfTile<__nv_bfloat16>, 2>("bfloat16"),
                                   kernel_set<Arithmetic::kBf16, HalfTile<__nv_bfloat16>, 4>("bfloat16"),
                                   kernel_set<Arithmetic::kBf16, HalfTile<__nv_bfloat16>, 8>("bfloat16")};
  return sets[set_number(batch_tiles)];
}

}  // namespace lstm_ext::cuda
