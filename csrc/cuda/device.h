// The GPUs of this machine as the CUDA runtime in this module sees them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lstm_ext::cuda {

struct DeviceReport {
  std::vector<std::string> names;  // "name (sm_90)"
  std::string reason;              // why the kernels cannot run; empty if they can
};

// As cudaRuntimeGetVersion gives it: 13000 for 13.0.
int runtime_version();

// Whether code for one of the architectures, as CMake lists them ("80-real 90a-real 120"), runs on a device: machine
// code on later ones of its major version, with an "a" on that one alone; what is not "-real" has PTX too, for all
// later ones.
bool runs_on(int compute_capability, const std::string& archs);

// Never throws for want of a driver or a device, and makes no context.
DeviceReport device_report();

// What the planner asks of a device.
struct DeviceLimits {
  int compute_capability;    // 90 for sm_90
  int sms;                   // multiprocessors
  int64_t shared_per_block;  // bytes of dynamic shared memory that a block may ask for
  int clock_khz;
  bool cooperative;  // it can run all blocks of a launch at the same time, and refuse where they do not fit
};

// Of a device; asked for once.
const DeviceLimits& device_limits(int device);

std::string device_name(int device);

// The newest CUDA that the driver knows: 13000 for 13.0.
int driver_version();

// Makes `device` the current one of this thread, and the former one again at the end. Where it is current already, as
// after an operation of torch's on it, nothing is set: setting a device makes a context there, which takes memory.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  static constexpr int kUnchanged = -1;
  int former_;
};

}  // namespace lstm_ext::cuda
