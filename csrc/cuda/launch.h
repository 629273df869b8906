// The one way to launch a kernel, and what the runtime says about a kernel and a device.
#pragma once

#include <cstdint>

#if defined(LSTM_EXT_CUDA_ON_CPU)
#include "cuda_on_cpu/launch.h"
#else

namespace lstm_ext::cuda {

// A kernel takes one plain struct by value.
template <class Params>
struct Kernel {
  const char* name;  // for messages
  void (*function)(Params);
};

struct Launch {
  int grid_x = 1, grid_y = 1, grid_z = 1;
  int threads = 1;
  int64_t shared_bytes = 0;  // dynamic
  int cluster = 1;           // blocks along x that form a cluster; above 1 from sm_90 on
  bool cooperative = false;  // all blocks run at the same time, or the launch fails
  void* stream = nullptr;    // cudaStream_t
};

// Each throws std::runtime_error with the kernel's name and the runtime's words for what failed.
void launch_raw(const char* name, const void* function, const Launch& how, const void* params);
int blocks_per_sm_raw(const char* name, const void* function, int threads, int64_t shared_bytes);
int active_clusters_raw(const char* name, const void* function, const Launch& how);
int registers_raw(const char* name, const void* function);

template <class Params>
void launch(const Kernel<Params>& kernel, const Launch& how, const Params& params) {
  launch_raw(kernel.name, reinterpret_cast<const void*>(kernel.function), how, &params);
}

// How many blocks of the kernel one multiprocessor of the current device can hold at a time.
template <class Params>
int blocks_per_sm(const Kernel<Params>& kernel, int threads, int64_t shared_bytes) {
  return blocks_per_sm_raw(kernel.name, reinterpret_cast<const void*>(kernel.function), threads, shared_bytes);
}

// How many clusters of that size the current device can hold at a time; 0 where it has none.
template <class Params>
int active_clusters(const Kernel<Params>& kernel, const Launch& how) {
  return active_clusters_raw(kernel.name, reinterpret_cast<const void*>(kernel.function), how);
}

// How many registers a thread of the kernel has.
template <class Params>
int registers(const Kernel<Params>& kernel) {
  return registers_raw(kernel.name, reinterpret_cast<const void*>(kernel.function));
}

// Zeros, in stream order.
void fill_zero(void* memory, int64_t bytes, void* stream);

struct DeviceLimits {
  int compute_capability;    // 90 for sm_90
  int sms;                   // multiprocessors
  int64_t shared_per_block;  // bytes of dynamic shared memory that a block may ask for
  int clock_khz;
  bool cooperative;
};

// Of a device; asked for once.
const DeviceLimits& device_limits(int device);

// Makes `device` the current one, and the former one again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int former_;
};

}  // namespace lstm_ext::cuda

#endif
