#include "kernels.cuh"

namespace lstm_ext::cuda {

const KernelSet& fp16_kernels(int batch_tiles) {
  static const KernelSet sets[] = {kernel_set<Arithmetic::kFp16, HalfTile<__half>, 1>("float16"),
                                   kernel_set<Arithmetic::kFp16, HalfTile<__half>, 2>("float16"),
                                   kernel_set<Arithmetic::kFp16, HalfTile<__half>, 4>("float16"),
                                   kernel_set<Arithmetic::kFp16, HalfTile<__half>, 8>("float16")};
  return sets[set_number(batch_tiles)];
}

}  // namespace lstm_ext::cuda
