// A kernel as csrc/cuda/launch.h has it. There is no nvcc here to tell the runtime about the functions that it
// compiles: a kernel does so itself.
#pragma once

#include "runtime.h"

namespace lstm_ext::cuda {

template <class Params>
struct Kernel {
  const char* name;
  void (*function)(Params);

  const void* entry() const {
    const void* address = reinterpret_cast<const void*>(function);
    cuda_on_cpu::add_kernel(address, name, [function = function](const void* params) -> std::function<void()> {
      return [function, copy = *static_cast<const Params*>(params)] { function(copy); };
    });
    return address;
  }
};

}  // namespace lstm_ext::cuda
