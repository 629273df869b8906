// The GPUs of this machine as the CUDA runtime in this module sees them.
#pragma once

#include <string>
#include <vector>

namespace lstm_ext::cuda {

struct DeviceReport {
  std::vector<std::string> names;  // "name (sm_90)"
  std::string reason;              // why the kernels cannot run; empty if they can
};

// As cudaRuntimeGetVersion gives it: 13000 for 13.0.
int runtime_version();

// Never throws for want of a driver or a device.
DeviceReport device_report();

}  // namespace lstm_ext::cuda
