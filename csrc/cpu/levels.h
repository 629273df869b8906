// The SIMD levels: kernels.cpp is compiled once for each that CMakeLists.txt names, and one of them is picked at run
// time.
#pragma once

#include "plan.h"

namespace lstm_ext::cpu {

// What a processor and its system may have. A level needs what its code was compiled for.
enum Feature : unsigned {
  kAvx2 = 1,
  kFma = 2,
  kAvx512 = 4,  // F, BW, VL and DQ
  kAvx512Bf16 = 8,
  kTiles = 16,  // AMX, and the permission to use it
  kAvx512Vnni = 32,
  kF16c = 64,
};

// One level. `needs` are Features. `pack` fills what `packed` of each direction points to, packed_bytes(…) of it, of a
// layer that need have no sequences; passes with the same weights then take it as it is.
struct Kernels {
  const char* name;
  unsigned needs;
  LevelShape shape;
  void (*pack)(const LayerForward&, const Plan&);
  void (*layer_forward)(const LayerForward&, const Plan&);
  void (*layer_backward)(const LayerBackward&, const Plan&);
};

// The widest level that was built and that this machine runs, and no wider than LSTM_EXT_SIMD says.
// Throws std::invalid_argument if that names no level.
const Kernels& kernels();

// The levels that were built, and those of them that run here, narrowest first; both end with a null pointer.
const Kernels* const* built_kernels();
const Kernels* const* available_kernels();

}  // namespace lstm_ext::cpu
