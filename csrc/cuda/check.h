// What becomes of an error of the CUDA runtime.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "launch.h"

namespace lstm_ext::cuda {

// The call that failed and the runtime's words for it. The error is reported here, and not in somebody else's next
// check as well.
inline std::string failure(const char* call, cudaError_t error) {
  (void)cudaGetLastError();
  const std::string timeout = timed_out();
  return std::string(call) + ": " + cudaGetErrorString(error) + (timeout.empty() ? "" : "; " + timeout);
}

inline void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) throw std::runtime_error("lstm_ext: " + failure(call, error));
}

inline void check(cudaError_t error, const char* call, const char* kernel) {
  if (error != cudaSuccess) throw std::runtime_error("lstm_ext: " + std::string(kernel) + ": " + failure(call, error));
}

}  // namespace lstm_ext::cuda
