// The kernels of one SIMD level, and the choice among the levels that were built.
#pragma once

#include "../params.h"

namespace lstm_ext::cpu {

struct Kernels {
  const char* level;
  void (*layer_forward)(const LayerForward&);
  void (*layer_backward)(const LayerBackward&);
};

// The widest level that was built and that this machine runs, or the one that LSTM_EXT_SIMD names.
// Throws std::runtime_error if that is not available.
const Kernels& kernels();

// Built and usable here, narrowest first; ends with a null pointer.
const Kernels* const* available_kernels();

}  // namespace lstm_ext::cpu
