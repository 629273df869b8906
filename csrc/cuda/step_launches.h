// The launches of steps on a stream.
#pragma once

#include "launch.h"

namespace lstm_ext::cuda {

// One after the other. Each but the first may begin while the one before it still runs, where the device can do that;
// what runs before the first is not ours, and may not be overlapped.
class StepLaunches {
 public:
  explicit StepLaunches(void* stream) : stream_(stream) {}

  template <class Params>
  void launch(const Kernel<Params>& kernel, LaunchConfig config, const Params& params) {
    config.overlaps = config.overlaps && !first_;
    first_ = false;
    cuda::launch(kernel, config, params, stream_);
  }

 private:
  void* stream_;
  bool first_ = true;
};

}  // namespace lstm_ext::cuda
