#include "build_info.h"

#include <pybind11/stl.h>

#include "cpu/kernels.h"
#if defined(LSTM_EXT_WITH_CUDA)
#include "cuda/device.h"
#endif

namespace lstm_ext {

pybind11::dict build_info() {
  namespace py = pybind11;
  py::dict info;
  info["version"] = LSTM_EXT_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  py::list available;
  for (auto level = cpu::available_kernels(); *level; ++level) available.append((*level)->level);
  info["simd_built"] = py::make_tuple("baseline"
#if defined(LSTM_EXT_HAVE_AVX2)
                                      ,
                                      "avx2"
#endif
#if defined(LSTM_EXT_HAVE_AVX512)
                                      ,
                                      "avx512"
#endif
#if defined(LSTM_EXT_HAVE_AVX512BF16)
                                      ,
                                      "avx512bf16"
#endif
#if defined(LSTM_EXT_HAVE_AMX)
                                      ,
                                      "amx"
#endif
  );
  info["simd_available"] = py::tuple(available);
  info["simd"] = cpu::kernels().level;
#if defined(LSTM_EXT_WITH_CUDA)
  info["cuda"] = true;
  info["cuda_archs"] = LSTM_EXT_CUDA_ARCHS;
  info["cudart"] = cuda::runtime_version();
#else
  info["cuda"] = false;
#endif
  return info;
}

pybind11::tuple gpus() {
#if defined(LSTM_EXT_WITH_CUDA)
  const cuda::DeviceReport report = cuda::device_report();
  return pybind11::make_tuple(report.names, report.reason);
#else
  return pybind11::make_tuple(pybind11::list(), "this build of lstm_ext has no CUDA part");
#endif
}

}  // namespace lstm_ext
