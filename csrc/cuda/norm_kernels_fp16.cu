#include "norm_kernels.cuh"

namespace lstm_ext::cuda {

const NormKernelSet& fp16_norm_kernels(Norm norm, bool tensorflow) {
  return norm_kernels<Arithmetic::kFp16, HalfTile<__half>>("float16", norm, tensorflow);
}

}  // namespace lstm_ext::cuda
