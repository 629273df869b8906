#include <pybind11/pybind11.h>

#include "build_info.h"
#include "cpu/team.h"
#include "ops/cpu_plan.h"
#include "ops/cuda_layer.h"
#include "ops/ops.h"

namespace py = pybind11;
using namespace py::literals;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of lstm_ext. Arguments are documented in csrc/ops/ops.h and lstm_ext/_C.pyi.";
  m.def("layer_forward", &lstm_ext::ops::layer_forward, "x"_a, "h0"_a, "c0"_a, "weights"_a, "lengths"_a, "resets"_a,
        "batch_sizes"_a, "directions"_a, "batch_first"_a, "save"_a, "num_threads"_a);
  m.def("layer_backward", &lstm_ext::ops::layer_backward, "dy"_a, "dh_n"_a, "dc_n"_a, "dcells"_a, "x"_a, "h0"_a, "c0"_a,
        "weights"_a, "y"_a, "cells"_a, "gates"_a, "lengths"_a, "resets"_a, "batch_sizes"_a, "directions"_a,
        "batch_first"_a, "needs"_a, "num_threads"_a);
  m.def("cell_forward", &lstm_ext::ops::cell_forward, "x"_a, "h"_a, "c"_a, "w_ih"_a, "w_hh"_a, "b_ih"_a, "b_hh"_a,
        "num_threads"_a);
  m.def("cuda_layer_forward", &lstm_ext::ops::cuda_layer_forward, "xw"_a, "h0"_a, "c0"_a, "weights"_a, "lengths"_a,
        "resets"_a, "packed_offset"_a, "directions"_a, "batch_first"_a, "save"_a, "tf32"_a, "strategy"_a);
  m.def("cuda_layer_backward", &lstm_ext::ops::cuda_layer_backward, "dy"_a, "dh_n"_a, "dc_n"_a, "dcells"_a, "h0"_a,
        "c0"_a, "weights"_a, "y"_a, "cells"_a, "gates"_a, "lengths"_a, "resets"_a, "packed_offset"_a, "directions"_a,
        "batch_first"_a, "needs"_a, "tf32"_a, "strategy"_a);
  m.def("cuda_cell_forward", &lstm_ext::ops::cuda_cell_forward, "x"_a, "h"_a, "c"_a, "w_ih"_a, "w_hh"_a, "b_ih"_a,
        "b_hh"_a, "tf32"_a);
  m.def("cuda_plan", &lstm_ext::ops::cuda_plan, "T"_a, "B"_a, "H"_a, "P"_a, "projected"_a, "dtype"_a, "tf32"_a,
        "num_directions"_a, "backward"_a, "strategy"_a, "device"_a);
  m.def("cpu_plan", &lstm_ext::ops::cpu_plan, "T"_a, "B"_a, "I"_a, "H"_a, "P"_a, "projected"_a, "dtype"_a,
        "num_directions"_a, "backward"_a, "num_threads"_a);
  m.def("force_cpu_plan", &lstm_ext::ops::force_cpu_plan, "engine"_a = py::none(), "in_place"_a = py::none(),
        "one_sum"_a = py::none(), "chunk_steps"_a = py::none(), "depth"_a = py::none(), "threads"_a = py::none(),
        "by_rows"_a = py::none());
  m.def("take_tensor_types", &lstm_ext::take_tensor_types);
  m.def("share_openmp_threads", &lstm_ext::cpu::share_openmp_threads, "library"_a);
  m.def("build_info", &lstm_ext::build_info);
  m.def("gpus", &lstm_ext::gpus);
}
