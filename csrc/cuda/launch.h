// The one way to launch a kernel, and what the runtime says about a kernel.
#pragma once

#include <cstdint>
#include <string>

#if defined(LSTM_EXT_CUDA_ON_CPU)
#include "cuda_on_cpu/kernel.h"
#else

namespace lstm_ext::cuda {

// A kernel takes one plain struct by value.
template <class Params>
struct Kernel {
  const char* name;  // for messages
  void (*function)(Params);

  // By which the runtime knows it.
  const void* entry() const { return reinterpret_cast<const void*>(function); }
};

}  // namespace lstm_ext::cuda

#endif

namespace lstm_ext::cuda {

struct Timeout;

struct LaunchConfig {
  int grid_x = 1, grid_y = 1;
  int threads = 1;
  int64_t shared_bytes = 0;  // dynamic
  int cluster = 1;           // blocks along x that form a cluster; above 1 from sm_90 on
  bool cooperative = false;  // all blocks run at the same time, or the launch fails
  // May begin before the launch ahead of it in the stream has ended, of which the kernel waits for what it needs
  // (ptx.h). From sm_90 on.
  bool overlaps = false;
};

// Each throws std::runtime_error with the kernel's name and the runtime's words for what failed. They are about the
// current device.
void prepare_raw(const char* name, const void* entry);
void launch_raw(const char* name, const void* entry, const LaunchConfig& config, const void* params, void* stream);
int blocks_per_sm_raw(const char* name, const void* entry, int threads, int64_t shared_bytes);
int active_clusters_raw(const char* name, const void* entry, const LaunchConfig& config);
int registers_raw(const char* name, const void* entry);

// Lets blocks of the kernel have as much shared memory as the device gives one. To be called before anything below; any
// but the first call for a kernel and a device does nothing. The attribute belongs to the whole process and is only a
// limit, which costs no occupancy: it is set once, and no launch can find the smaller limit of another thread's.
template <class Params>
void prepare(const Kernel<Params>& kernel) {
  prepare_raw(kernel.name, kernel.entry());
}

template <class Params>
void launch(const Kernel<Params>& kernel, const LaunchConfig& config, const Params& params, void* stream) {
  launch_raw(kernel.name, kernel.entry(), config, &params, stream);
}

// How many blocks of the kernel one multiprocessor can hold at a time.
template <class Params>
int blocks_per_sm(const Kernel<Params>& kernel, int threads, int64_t shared_bytes) {
  return blocks_per_sm_raw(kernel.name, kernel.entry(), threads, shared_bytes);
}

// How many clusters of that size the device can hold at a time; 0 where it has none.
template <class Params>
int active_clusters(const Kernel<Params>& kernel, const LaunchConfig& config) {
  return active_clusters_raw(kernel.name, kernel.entry(), config);
}

// How many registers a thread of the kernel has.
template <class Params>
int registers(const Kernel<Params>& kernel) {
  return registers_raw(kernel.name, kernel.entry());
}

// Where a kernel of this process leaves word when it gives up waiting: memory of the host.
Timeout* timeout_record();

// Which kernel of this process has given up waiting, and what for; empty if none has. The context is lost then, and
// every call fails with an error that says less.
std::string timed_out();

// Zeros, in stream order.
void fill_zero(void* memory, int64_t bytes, void* stream);

}  // namespace lstm_ext::cuda
