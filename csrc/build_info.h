// What this module was built from, and what it picked on this machine.
#pragma once

#include <pybind11/pybind11.h>

namespace lstm_ext {

pybind11::dict build_info();

// -> (names, why the CUDA kernels cannot run; empty if they can). The first call starts the CUDA driver in this
// process, after which a forked child cannot use it: not to be called at import.
pybind11::tuple gpus();

}  // namespace lstm_ext
