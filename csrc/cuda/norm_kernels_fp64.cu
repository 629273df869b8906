#include "norm_kernels.cuh"

namespace lstm_ext::cuda {

const NormKernelSet& fp64_norm_kernels(Norm norm, bool tensorflow) {
  return norm_kernels<Arithmetic::kFp64, Fp64Tile>("float64", norm, tensorflow);
}

}  // namespace lstm_ext::cuda
