#include "norm_kernels.cuh"

namespace lstm_ext::cuda {

const NormKernelSet& tf32_norm_kernels(Norm norm, bool tensorflow) {
  return norm_kernels<Arithmetic::kTf32, Tf32Tile>("TF32", norm, tensorflow);
}

}  // namespace lstm_ext::cuda
