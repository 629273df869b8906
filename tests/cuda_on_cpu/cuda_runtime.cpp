// The CUDA runtime's calls, made of runtime.h. What threads of the host share is the attribute of a kernel on a device,
// as on a GPU: the most dynamic shared memory that a block of it may ask for. A launch that asks for more than the
// attribute allows at that moment is refused.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "runtime.h"

namespace {

using namespace cuda_on_cpu;

constexpr int64_t kSharedWithoutAttribute = 48 * 1024;

thread_local std::string last_error = "no error";

std::mutex mutex;
std::map<std::pair<int, const void*>, int64_t> shared_limits;  // of a function on a device
std::set<int> with_context;
std::vector<std::string> spoiled;
std::atomic<int> queries{0};

cudaError_t fail_with(const std::string& why) {
  last_error = why;
  return cudaErrorInvalidValue;
}

// Of the current device: made by the first call that needs one.
void need_context() {
  const std::lock_guard<std::mutex> lock(mutex);
  with_context.insert(current_device);
}

bool is_device(int device) { return 0 <= device && static_cast<size_t>(device) < devices.size(); }

int64_t shared_limit(const void* function) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = shared_limits.find({current_device, function});
  return found == shared_limits.end() ? kSharedWithoutAttribute : found->second;
}

Index index_of(const dim3& dim) { return {dim.x, dim.y, dim.z}; }

}  // namespace

void cuda_on_cpu::spoil_kernels(std::vector<std::string> parts) { spoiled = std::move(parts); }
std::set<int> cuda_on_cpu::contexts() {
  const std::lock_guard<std::mutex> lock(mutex);
  return with_context;
}
int cuda_on_cpu::occupancy_queries() { return queries; }

const char* cudaGetErrorString(cudaError_t) { return last_error.c_str(); }
cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = static_cast<int>(devices.size());
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (!is_device(device)) return fail_with("no such device");
  const int capability = devices[static_cast<size_t>(device)].compute_capability;
  *properties = {"fibers", capability / 10, capability % 10};
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (!is_device(device)) return fail_with("no such device");
  const Device& of = devices[static_cast<size_t>(device)];
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = of.compute_capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = of.compute_capability % 10; break;
    case cudaDevAttrMultiProcessorCount: *value = of.sms; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(of.shared_per_block); break;
    case cudaDevAttrClockRate: *value = of.clock_khz; break;
    case cudaDevAttrCooperativeLaunch: *value = 1; break;
  }
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (!is_device(device)) return fail_with("no such device");
  current_device = device;
  need_context();  // since CUDA 12
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  need_context();
  if (value > device().shared_per_block) return fail_with(std::to_string(value) + " bytes of shared memory in a block");
  {
    const std::lock_guard<std::mutex> lock(mutex);
    shared_limits[{current_device, function}] = value;
  }
  // Others go on here, as they may on any machine: who counts on the value that it has just set is found out.
  std::this_thread::sleep_for(std::chrono::milliseconds(1));
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  need_context();
  attributes->numRegs = 0;  // nobody knows
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads,
                                                          size_t shared_bytes) {
  ++queries;
  need_context();
  const int64_t bytes = static_cast<int64_t>(shared_bytes);
  *blocks = bytes > shared_limit(function) ? 0 : blocks_per_sm(threads, bytes);
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* function, const cudaLaunchConfig_t* config) {
  int blocks = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, static_cast<int>(config->blockDim.x),
                                                config->dynamicSmemBytes);
  *clusters = device().sms * blocks / static_cast<int>(config->attrs[0].val.clusterDim.x);
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  if (device_is_lost) return fail_with("unspecified launch failure");
  if (static_cast<int64_t>(config->dynamicSmemBytes) > shared_limit(function))
    return fail_with(std::to_string(config->dynamicSmemBytes) + " bytes of shared memory in a block, which may have " +
                     std::to_string(shared_limit(function)) + " now");
  const KnownKernel kernel = known_kernel(function);
  Grid grid;
  grid.kernel = kernel.name;
  grid.grid_dim = index_of(config->gridDim);
  grid.block_dim = index_of(config->blockDim);
  grid.cluster_dim = {1, 1, 1};
  grid.shared_size = config->dynamicSmemBytes;
  grid.body = kernel.with(arguments[0]);
  bool cooperative = false, overlaps = false;
  for (unsigned n = 0; n < config->numAttrs; ++n) {
    const cudaLaunchAttribute& attribute = config->attrs[n];
    if (attribute.id == cudaLaunchAttributeCooperative) cooperative = attribute.val.cooperative != 0;
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization)
      overlaps = attribute.val.programmaticStreamSerializationAllowed != 0;
    if (attribute.id == cudaLaunchAttributeClusterDimension)
      grid.cluster_dim = {attribute.val.clusterDim.x, attribute.val.clusterDim.y, attribute.val.clusterDim.z};
  }
  try {
    launch(std::move(grid), cooperative, overlaps, config->stream);
    const auto is_named = [&](const std::string& part) { return kernel.name.find(part) != std::string::npos; };
    if (std::any_of(spoiled.begin(), spoiled.end(), is_named)) enqueue(config->stream, kernel.spoil(arguments[0]));
  } catch (const std::runtime_error& refused) {
    return fail_with(refused.what());
  }
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  *memory = malloc(bytes);
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

cudaError_t cudaMemsetAsync(void* memory, int byte, size_t bytes, cudaStream_t stream) {
  enqueue(stream, [=] { memset(memory, byte, bytes); });
  return cudaSuccess;
}
