#include "launch.h"

#include <cuda_runtime_api.h>

#include <atomic>
#include <mutex>
#include <new>
#include <set>
#include <utility>

#include "check.h"
#include "device.h"
#include "layout.h"

namespace lstm_ext::cuda {
namespace {

constexpr int kPortableCluster = 8;  // blocks, on every device that has clusters

// LaunchConfig in the runtime's terms.
struct RuntimeConfig {
  cudaLaunchAttribute attributes[3];
  cudaLaunchConfig_t config = {};

  RuntimeConfig(const LaunchConfig& of, void* stream) {
    config.gridDim = dim3(of.grid_x, of.grid_y);
    config.blockDim = dim3(of.threads);
    config.dynamicSmemBytes = static_cast<size_t>(of.shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    if (of.cluster > 1) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = static_cast<unsigned>(of.cluster);
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    }
    if (of.cooperative) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
    if (of.overlaps) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
  }
};

// Allocated at the first launch, also while a stream is captured: it is no part of the graph.
Timeout* allocate_timeout() {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
  void* memory = nullptr;
  const cudaError_t error = cudaHostAlloc(&memory, sizeof(Timeout), cudaHostAllocPortable | cudaHostAllocMapped);
  (void)cudaThreadExchangeStreamCaptureMode(&mode);
  check(error, "cudaHostAlloc");
  return new (memory) Timeout{};
}

std::atomic<Timeout*> timeout{nullptr};

}  // namespace

Timeout* timeout_record() {
  static Timeout* const record = timeout = allocate_timeout();
  return record;
}

std::string timed_out() {
  const volatile Timeout* record = timeout;
  if (!record || !record->kernel) return "";
  return std::string(record->kernel) + " gave up: block " + std::to_string(record->block) + ", rank " +
         std::to_string(record->rank) + " of its team, waited for exchange " + std::to_string(record->exchange) +
         " of another block for more than " + std::to_string(kMostNanoseconds / 1'000'000'000) +
         " s; the GPU cannot be used by this process any more";
}

void prepare_raw(const char* name, const void* entry) {
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> prepared;  // on a device
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  if (prepared.count({device, entry})) return;
  check(cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(device_limits(device).shared_per_block)),
        "cudaFuncSetAttribute", name);
  if (device_limits(device).compute_capability >= 90)
    check(cudaFuncSetAttribute(entry, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cudaFuncSetAttribute", name);
  prepared.insert({device, entry});
}

void launch_raw(const char* name, const void* entry, const LaunchConfig& config, const void* params, void* stream) {
  const RuntimeConfig runtime(config, stream);
  void* arguments[] = {const_cast<void*>(params)};
  check(cudaLaunchKernelExC(&runtime.config, entry, arguments), "cudaLaunchKernelExC", name);
}

int blocks_per_sm_raw(const char* name, const void* entry, int threads, int64_t shared_bytes) {
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, entry, threads, static_cast<size_t>(shared_bytes)),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor", name);
  return blocks;
}

int active_clusters_raw(const char* name, const void* entry, const LaunchConfig& config) {
  const RuntimeConfig runtime(config, nullptr);
  int clusters = 0;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, entry, &runtime.config);
  if (error != cudaSuccess && config.cluster > kPortableCluster) {  // not each device takes more than is portable
    (void)cudaGetLastError();
    return 0;
  }
  check(error, "cudaOccupancyMaxActiveClusters", name);
  return clusters;
}

int registers_raw(const char* name, const void* entry) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, entry), "cudaFuncGetAttributes", name);
  return attributes.numRegs;
}

void fill_zero(void* memory, int64_t bytes, void* stream) {
  check(cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
}

}  // namespace lstm_ext::cuda
