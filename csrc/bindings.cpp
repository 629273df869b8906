#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "build_info.h"
#include "cpu/team.h"
#include "cuda/launch.h"
#include "cuda/plan.h"
#include "ops/cpu_plan.h"
#include "ops/frozen.h"
#include "ops/gpu_hooks.h"
#include "ops/gpu_plan.h"
#include "ops/ops.h"

namespace py = pybind11;
using namespace py::literals;

PYBIND11_MODULE(core, m) {
  // NumPy's functions, which pybind11 would otherwise look for in the first call. It gives Python's lock away
  // meanwhile, and a thread that is there when the interpreter ends would end the process (see ops/gil.h).
  py::detail::npy_api::get();
  m.doc() = "Native kernels of lstm_ext. Arguments are documented in csrc/ops/ops.h and lstm_ext/_C.pyi.";
  m.def("layer_forward", &lstm_ext::ops::layer_forward, "call"_a, "save"_a, "num_threads"_a = 0);
  m.def("layer_backward", &lstm_ext::ops::layer_backward, "call"_a, "saved"_a, "grads"_a, "needs"_a,
        "num_threads"_a = 0);
  py::class_<lstm_ext::ops::Frozen, std::shared_ptr<lstm_ext::ops::Frozen>>(m, "Frozen")
      .def(py::init<const py::list&, lstm_ext::ops::Directions, const std::string&, const std::string&>(), "layers"_a,
           "directions"_a, "dtype"_a, "storage"_a)
      .def("run", &lstm_ext::ops::Frozen::run, "call"_a, "num_threads"_a = 0)
      .def("plans", &lstm_ext::ops::Frozen::plans, "T"_a, "B"_a, "num_threads"_a)
      .def("bytes", &lstm_ext::ops::Frozen::bytes);
  py::class_<lstm_ext::ops::Stream>(m, "Stream")
      .def(py::init<std::shared_ptr<lstm_ext::ops::Frozen>, const py::tuple&>(), py::arg("frozen").none(false),
           "states"_a)
      .def("step", &lstm_ext::ops::Stream::step, "x"_a, "batch_first"_a, "out"_a, "lengths"_a, "resets"_a,
           "num_threads"_a = 0)
      .def("current", &lstm_ext::ops::Stream::current)
      .def("hold", &lstm_ext::ops::Stream::hold)
      .def("release", &lstm_ext::ops::Stream::release);
#if defined(LSTM_EXT_WITH_CUDA)
  m.def("cuda_layer_forward", &lstm_ext::ops::cuda_layer_forward, "steps"_a, "save"_a, "tf32"_a, "strategy"_a);
  m.def("cuda_layer_backward", &lstm_ext::ops::cuda_layer_backward, "steps"_a, "saved"_a, "grads"_a, "needs"_a,
        "tf32"_a, "strategy"_a, "normed"_a = py::none(), "scales"_a = py::none());
  m.def("cuda_h_before", &lstm_ext::ops::cuda_h_before, "steps"_a, "saved"_a);
  m.def("cuda_step_forward", &lstm_ext::ops::cuda_step_forward, "call"_a, "tf32"_a);
  m.def("cuda_plan", &lstm_ext::ops::cuda_plan, "T"_a, "B"_a, "H"_a, "P"_a, "projected"_a, "dtype"_a, "tf32"_a,
        "num_directions"_a, "backward"_a, "strategy"_a, "device"_a, "cell"_a = py::none());
  m.def("cuda_take_hooks", &lstm_ext::ops::cuda_take_hooks, "introduce"_a, "check"_a);
  m.def("cuda_set_measured", &lstm_ext::ops::cuda_set_measured, "device"_a, "rows"_a);
  m.def("cuda_device", &lstm_ext::ops::cuda_device, "device"_a);
  m.def("cuda_timed_out", &lstm_ext::cuda::timed_out);
#endif
  m.def("sm_margin", &lstm_ext::cuda::sm_margin);
  m.def("set_sm_margin", &lstm_ext::cuda::set_sm_margin, "margin"_a);
  m.def("cpu_plan", &lstm_ext::ops::cpu_plan, "T"_a, "B"_a, "I"_a, "H"_a, "P"_a, "projected"_a, "dtype"_a,
        "num_directions"_a, "backward"_a, "num_threads"_a);
  m.def("gpu_plan", &lstm_ext::ops::gpu_plan, "T"_a, "B"_a, "H"_a, "P"_a, "projected"_a, "dtype"_a, "tf32"_a,
        "num_directions"_a, "backward"_a, "strategy"_a, "compute_capability"_a, "sms"_a, "gpcs"_a, "shared_bytes"_a,
        "clock_khz"_a, "cell"_a = py::none());
  m.def("force_cpu_plan", &lstm_ext::ops::force_cpu_plan, "engine"_a = py::none(), "in_place"_a = py::none(),
        "one_sum"_a = py::none(), "chunk_steps"_a = py::none(), "depth"_a = py::none(), "threads"_a = py::none(),
        "by_rows"_a = py::none());
  m.def("take_tensor_types", &lstm_ext::take_tensor_types, "types"_a, "num_threads"_a);
  m.def("share_openmp_threads", &lstm_ext::cpu::share_openmp_threads, "library"_a);
  m.def("build_info", &lstm_ext::build_info);
  m.def("gpus", &lstm_ext::gpus);
}

// The module's entry point: pybind11's, but in the main interpreter alone. In another one pybind11 waits for ever for
// the lock that it holds (Python 3.11), and the threads and types that the core keeps belong to one interpreter.
extern "C" PYBIND11_EXPORT PyObject* PyInit__C() {
  if (PyInterpreterState_Get() == PyInterpreterState_Main()) return PyInit_core();
  PyErr_SetString(PyExc_ImportError, "lstm_ext._C: expected the main interpreter, got a subinterpreter");
  return nullptr;
}
