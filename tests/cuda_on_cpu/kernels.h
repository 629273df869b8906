// The kernels of csrc/cuda for pytest: a layer as the CPU kernels take it, but for what torch does on a GPU.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace cuda_on_cpu {

namespace py = pybind11;

struct Options {
  std::string strategy;
  bool tf32;
  int device;     // a number of `devices`
  uint64_t seed;  // of the schedule
};

// -> (y, h_n, c_n, cells or None, gates or None) as lstm_ext._C.layer_forward. `xw`: x W_ih', laid out as the gates, in
// float32 for half types; or None, for strategies that take x themselves.
py::tuple layer_forward(py::handle x, py::handle h0, py::handle c0, py::sequence weights, py::handle lengths,
                        py::handle resets, py::handle batch_sizes, int directions, bool batch_first, int save,
                        py::handle xw, const Options& options);

// -> (d_gates, h_prev, dh0, dc0, d_h or None, hidden or None): the gradient of the gates before their activation and
// what the gradients of the weights are products of, all laid out as the gates and of the widths 4H, P, P, H.
py::tuple layer_backward(py::handle dy, py::handle dh_n, py::handle dc_n, py::handle dcells, py::handle x,
                         py::handle h0, py::handle c0, py::sequence weights, py::handle y, py::handle cells,
                         py::handle gates, py::handle lengths, py::handle resets, py::handle batch_sizes,
                         int directions, bool batch_first, int needs, const Options& options);

// What the planner says of a layer: strategy, blocks, shared bytes, ...
py::dict plan(py::handle x, py::sequence weights, int directions, bool backward, const Options& options);

}  // namespace cuda_on_cpu
