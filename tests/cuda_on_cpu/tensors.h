// Tensors in the memory of the CPU as tensors of this folder's devices.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace cuda_on_cpu {

namespace py = pybind11;

// From now on CPU tensors of this type count as tensors of one of the devices, and what is allocated for kernels is
// full of NaN at first. Throws TypeError for a type without the DLPack exchange API.
void take_tensors(py::type type);

// The number in `devices` of that one. Which is current is up to the code under test, as on a GPU.
void use_device(int number);

// Runs what was launched, as runtime.h says. Until then what was allocated stays, as it does for a stream of a GPU.
void run_launched(uint64_t seed);

}  // namespace cuda_on_cpu
