#include "launch.h"

#include <cuda_runtime_api.h>

#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace lstm_ext::cuda {
namespace {

void check(cudaError_t error, const char* kernel, const char* call) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // reported here, and not in somebody else's next check as well
  const std::string where = *kernel ? std::string(kernel) + ": " : std::string();
  throw std::runtime_error("lstm_ext: " + where + call + ": " + cudaGetErrorString(error));
}

void allow_shared_memory(const char* name, const void* function, int64_t bytes) {
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), name,
        "cudaFuncSetAttribute");
}

struct Configuration {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};

  explicit Configuration(const Launch& how) {
    config.gridDim = dim3(how.grid_x, how.grid_y, how.grid_z);
    config.blockDim = dim3(how.threads);
    config.dynamicSmemBytes = static_cast<size_t>(how.shared_bytes);
    config.stream = static_cast<cudaStream_t>(how.stream);
    config.attrs = attributes;
    if (how.cluster > 1) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = static_cast<unsigned>(how.cluster);
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    }
    if (how.cooperative) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
  }
};

int attribute_of(int device, cudaDeviceAttr attribute) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), "", "cudaDeviceGetAttribute");
  return value;
}

DeviceLimits limits_of(int device) {
  const auto get = [&](cudaDeviceAttr attribute) { return attribute_of(device, attribute); };
  return {get(cudaDevAttrComputeCapabilityMajor) * 10 + get(cudaDevAttrComputeCapabilityMinor),
          get(cudaDevAttrMultiProcessorCount), get(cudaDevAttrMaxSharedMemoryPerBlockOptin), get(cudaDevAttrClockRate),
          get(cudaDevAttrCooperativeLaunch) != 0};
}

}  // namespace

void launch_raw(const char* name, const void* function, const Launch& how, const void* params) {
  allow_shared_memory(name, function, how.shared_bytes);
  const Configuration configuration(how);
  void* arguments[] = {const_cast<void*>(params)};
  check(cudaLaunchKernelExC(&configuration.config, function, arguments), name, "cudaLaunchKernelExC");
}

int blocks_per_sm_raw(const char* name, const void* function, int threads, int64_t shared_bytes) {
  allow_shared_memory(name, function, shared_bytes);
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, threads, static_cast<size_t>(shared_bytes)),
        name, "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return blocks;
}

int active_clusters_raw(const char* name, const void* function, const Launch& how) {
  allow_shared_memory(name, function, how.shared_bytes);
  const Configuration configuration(how);
  int clusters = 0;
  check(cudaOccupancyMaxActiveClusters(&clusters, function, &configuration.config), name,
        "cudaOccupancyMaxActiveClusters");
  return clusters;
}

int registers_raw(const char* name, const void* function) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, function), name, "cudaFuncGetAttributes");
  return attributes.numRegs;
}

void fill_zero(void* memory, int64_t bytes, void* stream) {
  check(cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)), "",
        "cudaMemsetAsync");
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

DeviceGuard::DeviceGuard(int device) {
  check(cudaGetDevice(&former_), "", "cudaGetDevice");
  if (former_ != device) check(cudaSetDevice(device), "", "cudaSetDevice");
}

DeviceGuard::~DeviceGuard() { (void)cudaSetDevice(former_); }

}  // namespace lstm_ext::cuda
