#include "norm_kernels.cuh"

namespace lstm_ext::cuda {

const NormKernelSet& fp32_norm_kernels(Norm norm, bool tensorflow) {
  return norm_kernels<Arithmetic::kFp32, Fp32Tile>("float32", norm, tensorflow);
}

}  // namespace lstm_ext::cuda
