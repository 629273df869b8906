#include "kernels.cuh"

namespace lstm_ext::cuda {

const KernelSet& bf16_kernels(int batch_tiles) {
  static const KernelSet sets[] = {kernel_set<Arithmetic::kBf16, HalfTile<__nv_bfloat16>, 1>("bfloat16"),
                                   kernel_set<Arithmetic::kBf16, HalfTile<__nv_bfloat16>, 2>("bfloat16"),
                                   kernel_set<Arithmetic::kBf16, HalfTile<__nv_bfloat16>, 4>("bfloat16")};
  return sets[batch_tiles / 2];
}

}  // namespace lstm_ext::cuda
