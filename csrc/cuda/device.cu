#include "device.h"

#include <cuda_runtime_api.h>

#include <mutex>
#include <sstream>
#include <stdexcept>

#include "check.h"

namespace lstm_ext::cuda {
namespace {

constexpr int kAssumedClockKhz = 1'500'000;  // of virtual and embedded GPUs, some of which report 0

// Why the current device cannot run what was compiled; empty if it can. Asking the runtime about a kernel would tell
// too, and make a context on that device, which takes memory: some only want to know what there is.
std::string refusal_of_current_device() {
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  if (runs_on(major * 10 + minor, LSTM_EXT_CUDA_ARCHS)) return "";
  return "compiled for the architectures " LSTM_EXT_CUDA_ARCHS ", not for compute capability " + std::to_string(major) +
         "." + std::to_string(minor);
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

bool runs_on(int capability, const std::string& archs) {
  std::istringstream list(archs);
  for (std::string arch; list >> arch;) {
    const size_t end = arch.find_first_not_of("0123456789");
    const int number = std::stoi(arch.substr(0, end));
    const std::string kind = end == std::string::npos ? "" : arch.substr(end);  // "", "-real", "a-real", "f-real"
    const bool newer = capability >= number, same_major = capability / 10 == number / 10;
    if (kind.empty() ? newer : kind[0] == 'a' ? capability == number : newer && same_major) return true;
  }
  return false;
}

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
