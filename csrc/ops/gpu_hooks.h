// What Python has to say in the plan of a layer on a GPU: times that were measured on this one, and whether a kernel
// computes rightly on it.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>

#include "../cuda/layer.h"

namespace lstm_ext::ops {

namespace py = pybind11;

// Calls introduce(device) before the first plan for a device, and check(device, kernel, dtype, tf32, forced, projected,
// backward, cell) before the first launch of a kernel on one; `cell` is "" for the plain LSTM, else whose layout the
// weights of a cell with options have, "torch" or "TensorFlow". `forced` is the strategy by which exactly that kernel
// runs. check returns what is wrong, "" for nothing, or None where it cannot tell now, and is asked again.
void cuda_take_hooks(py::object introduce, py::object check);

// Rows of (dtype, tf32, num_directions, backward, T, B, H, P, date, {strategy: microseconds of a step}), of which the
// nearest to a shape decides how it runs.
void cuda_set_measured(int device, const py::list& rows);

// -> {"name", "compute_capability", "sms", "driver"}
py::dict cuda_device(int device);

// The first of the above, where it has not been called for the device.
void introduce(int device);

// A plan whose kernel may be launched; null, and why, where self-checks leave none. The lock of Python is held.
std::shared_ptr<const cuda::Plan> plan_to_launch(const SequenceShape& shape, int directions, bool backward,
                                                 const cuda::LayerOptions& options, int device, std::string& refused);

}  // namespace lstm_ext::ops
