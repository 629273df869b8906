#include "norm_kernels.cuh"

namespace lstm_ext::cuda {

const NormKernelSet& bf16_norm_kernels(Norm norm, bool tensorflow) {
  return norm_kernels<Arithmetic::kBf16, HalfTile<__nv_bfloat16>>("bfloat16", norm, tensorflow);
}

}  // namespace lstm_ext::cuda
