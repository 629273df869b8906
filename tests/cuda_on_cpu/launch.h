// csrc/cuda/launch.h for the device of this folder: the same names, whose comments stand there.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <utility>

#include "runtime.h"

namespace lstm_ext::cuda {

template <class Params>
struct Kernel {
  const char* name;
  void (*function)(Params);
};

struct Launch {
  int grid_x = 1, grid_y = 1, grid_z = 1;
  int threads = 1;
  int64_t shared_bytes = 0;
  int cluster = 1;
  bool cooperative = false;
  void* stream = nullptr;
};

template <class Params>
void launch(const Kernel<Params>& kernel, const Launch& how, const Params& params) {
  const auto index = [](int x, int y, int z) {
    return cuda_on_cpu::Index{static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)};
  };
  cuda_on_cpu::Grid grid;
  grid.kernel = kernel.name;
  grid.grid_dim = index(how.grid_x, how.grid_y, how.grid_z);
  grid.block_dim = index(how.threads, 1, 1);
  grid.cluster_dim = index(how.cluster, 1, 1);
  grid.shared_size = static_cast<size_t>(how.shared_bytes);
  grid.body = [function = kernel.function, params] { function(params); };
  cuda_on_cpu::launch(std::move(grid), how.cooperative, how.stream);
}

template <class Params>
int blocks_per_sm(const Kernel<Params>&, int threads, int64_t shared_bytes) {
  return cuda_on_cpu::blocks_per_sm(threads, shared_bytes);
}

template <class Params>
int active_clusters(const Kernel<Params>&, const Launch& how) {
  return cuda_on_cpu::device().sms * cuda_on_cpu::blocks_per_sm(how.threads, how.shared_bytes) / how.cluster;
}

template <class Params>
int registers(const Kernel<Params>&) {
  return 0;  // nobody knows
}

inline void fill_zero(void* memory, int64_t bytes, void* stream) {
  cuda_on_cpu::enqueue(stream, [=] { memset(memory, 0, static_cast<size_t>(bytes)); });
}

struct DeviceLimits {
  int compute_capability;
  int sms;
  int64_t shared_per_block;
  int clock_khz;
  bool cooperative;
};

inline const DeviceLimits& device_limits(int device) {
  static std::map<int, DeviceLimits> known;
  const cuda_on_cpu::Device& of = cuda_on_cpu::devices.at(static_cast<size_t>(device));
  return known[device] = {of.compute_capability, of.sms, of.shared_per_block, of.clock_khz, true};
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : former_(std::exchange(cuda_on_cpu::current_device, device)) {}
  ~DeviceGuard() { cuda_on_cpu::current_device = former_; }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int former_;
};

}  // namespace lstm_ext::cuda
