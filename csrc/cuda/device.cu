#include "device.h"

#include <cuda_runtime_api.h>

#include <stdexcept>

#include "kernels.h"

namespace lstm_ext::cuda {
namespace {

std::string failure(const char* call, cudaError_t error) {
  (void)cudaGetLastError();  // a failed query must not surface in somebody else's next check
  return std::string(call) + ": " + cudaGetErrorString(error);
}

// Why the current device cannot run what was compiled; empty if it can.
std::string refusal_of_current_device() {
  try {
    (void)registers(fp64_kernels(1).step_forward);
    return "";
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

}  // namespace

int runtime_version() { return CUDART_VERSION; }

DeviceReport device_report() {
  DeviceReport report;
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess) {
    report.reason = failure("cudaGetDeviceCount", error);
    return report;
  }
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties;
    if (const cudaError_t error = cudaGetDeviceProperties(&properties, device); error != cudaSuccess) {
      report.reason = failure("cudaGetDeviceProperties", error);
      return report;
    }
    report.names.push_back(std::string(properties.name) + " (sm_" +
                           std::to_string(properties.major * 10 + properties.minor) + ")");
  }
  report.reason = count == 0 ? "the CUDA driver reports no device" : refusal_of_current_device();
  return report;
}

}  // namespace lstm_ext::cuda
