#include "device.h"

#include <cuda_runtime_api.h>

#include <mutex>
#include <stdexcept>

#include "check.h"
#include "kernels.h"

namespace lstm_ext::cuda {
namespace {

constexpr int kAssumedClockKhz = 1'500'000;  // of virtual and embedded GPUs, some of which report 0

// Why the current device cannot run what was compiled; empty if it can.
std::string refusal_of_current_device() {
  try {
    (void)registers(fp64_kernels(1).step_forward);
    return "";
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

DeviceLimits limits_of(int device) {
  const auto get = [&](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
    return value;
  };
  const int clock = get(cudaDevAttrClockRate);
  return {get(cudaDevAttrComputeCapabilityMajor) * 10 + get(cudaDevAttrComputeCapabilityMinor),
          get(cudaDevAttrMultiProcessorCount), get(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          clock > 0 ? clock : kAssumedClockKhz, get(cudaDevAttrCooperativeLaunch) != 0};
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

const DeviceLimits& device_limits(int device) {
  static std::mutex mutex;
  static std::vector<DeviceLimits*> known;  // never freed: references are handed out
  const std::lock_guard<std::mutex> lock(mutex);
  if (device >= static_cast<int>(known.size())) known.resize(static_cast<size_t>(device) + 1);
  DeviceLimits*& limits = known[static_cast<size_t>(device)];
  if (!limits) limits = new DeviceLimits(limits_of(device));
  return *limits;
}

std::string device_name(int device) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  return properties.name;
}

int driver_version() {
  int version = 0;
  check(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
  return version;
}

DeviceGuard::DeviceGuard(int device) {
  check(cudaGetDevice(&former_), "cudaGetDevice");
  if (former_ == device) {
    former_ = kUnchanged;
  } else {
    check(cudaSetDevice(device), "cudaSetDevice");
  }
}

DeviceGuard::~DeviceGuard() {
  if (former_ != kUnchanged) (void)cudaSetDevice(former_);
}

}  // namespace lstm_ext::cuda
