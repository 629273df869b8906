#include "build_info.h"

#include <pybind11/stl.h>

#include <string>

#include "cpu/levels.h"
#if defined(LSTM_EXT_WITH_CUDA)
#include "cuda/device.h"
#endif

namespace lstm_ext {

#if !defined(LSTM_EXT_WITH_CUDA)
namespace {
constexpr const char* kNoCuda =  // why; CMake writes the file
#include "no_cuda.inc"
    ;
}  // namespace
#endif

pybind11::dict build_info() {
  namespace py = pybind11;
  py::dict info;
  info["version"] = LSTM_EXT_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  const auto names_of = [](const cpu::Kernels* const* levels) {
    py::list names;
    for (; *levels; ++levels) names.append((*levels)->name);
    return py::tuple(names);
  };
  info["simd_built"] = names_of(cpu::built_kernels());
  info["simd_available"] = names_of(cpu::available_kernels());
  info["simd"] = cpu::kernels().name;
#if defined(LSTM_EXT_WITH_CUDA)
  info["cuda"] = true;
  info["cuda_archs"] = LSTM_EXT_CUDA_ARCHS;
  info["cudart"] = cuda::runtime_version();
#else
  info["cuda"] = false;
  info["cuda_reason"] = kNoCuda;
#endif
  return info;
}

pybind11::tuple gpus() {
#if defined(LSTM_EXT_WITH_CUDA)
  const cuda::DeviceReport report = cuda::device_report();
  return pybind11::make_tuple(report.names, report.reason);
#else
  return pybind11::make_tuple(pybind11::list(), std::string("this build of lstm_ext has no CUDA part: ") + kNoCuda);
#endif
}

}  // namespace lstm_ext
