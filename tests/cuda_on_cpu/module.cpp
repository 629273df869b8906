// The kernels and the harness for pytest.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "broken_kernels.h"
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/layout.h"
#include "cuda/plan.h"
#include "ops/gpu_hooks.h"
#include "ops/ops.h"
#include "ptx.h"
#include "tensors.h"

namespace py = pybind11;
using namespace py::literals;

namespace cuda_on_cpu {
namespace {

using Words = py::array_t<uint32_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;

// One warp's collective on the fragments of its lanes.
struct WarpParams {
  std::string kind;
  const uint32_t *a, *b;  // [32, 4], [32, 2]
  float* d;               // [32, 4]
};

void mma_kernel(WarpParams p) {
  const int lane = threadIdx.x;
  const uint4 a = reinterpret_cast<const uint4*>(p.a)[lane];
  const uint2 b = reinterpret_cast<const uint2*>(p.b)[lane];
  float d[4];
  std::copy_n(p.d + 4 * lane, 4, d);
  if (p.kind == "float16") mma_fp16(d, a, b, Location::current());
  if (p.kind == "bfloat16") mma_bf16(d, a, b, Location::current());
  if (p.kind == "tf32") mma_tf32(d, a, b, Location::current());
  std::copy_n(d, 4, p.d + 4 * lane);
}

Floats mma(const std::string& kind, const Words& a, const Words& b, const Floats& d) {
  Floats result(d.request().shape);
  std::copy_n(d.data(), d.size(), result.mutable_data());
  const WarpParams params{kind, a.data(), b.data(), result.mutable_data()};
  lstm_ext::cuda::launch(lstm_ext::cuda::Kernel<WarpParams>{"mma", mma_kernel}, {.threads = 32}, params, nullptr);
  synchronize(0);
  return result;
}

struct LdmatrixParams {
  const uint16_t* rows;  // [8 count, 8]
  int count;
  bool transposed;
  uint32_t* fragments;  // [32, count]
};

void ldmatrix_kernel(LdmatrixParams p) {
  const int lane = threadIdx.x, rows = 8 * p.count;
  auto* shared = reinterpret_cast<uint16_t*>(lstm_ext::cuda::dynamic_shared());
  if (lane < rows) std::copy_n(p.rows + 8 * lane, 8, shared + 8 * lane);
  __syncwarp();
  ldmatrix(p.fragments + p.count * lane, p.count, p.transposed, shared + 8 * (lane % rows), Location::current());
}

Words ldmatrix_of(const py::array_t<uint16_t, py::array::c_style>& rows, bool transposed) {
  const int count = static_cast<int>(rows.shape(0)) / 8;
  Words fragments({32, count});
  const LdmatrixParams params{rows.data(), count, transposed, fragments.mutable_data()};
  const lstm_ext::cuda::LaunchConfig config{.threads = 32, .shared_bytes = 128 * count};
  lstm_ext::cuda::launch(lstm_ext::cuda::Kernel<LdmatrixParams>{"ldmatrix", ldmatrix_kernel}, config, params, nullptr);
  synchronize(0);
  return fragments;
}

// Work on two streams; returns the order in which it ran.
std::string stream_order(uint64_t seed) {
  std::string order;
  int first = 0, second = 0;  // whose addresses stand for streams
  for (const char* name : {"a", "b", "c"}) enqueue(&first, [&order, name] { order += name; });
  for (const char* name : {"x", "y", "z"}) enqueue(&second, [&order, name] { order += name; });
  synchronize(seed);
  return order;
}

}  // namespace
}  // namespace cuda_on_cpu

PYBIND11_MODULE(lstm_ext_cuda_on_cpu, m) {
  using namespace cuda_on_cpu;
  m.attr("address_sanitizer") = kAddressSanitizer;
  m.def("take_tensors", &take_tensors);
  m.def("use_device", &use_device);
  m.def("cuda_timed_out", &lstm_ext::cuda::timed_out);
  m.def("mute_block", [](int block) { mute_block = block; }, "block"_a);
  m.def("revive_device", [] {
    mute_block = -1;
    device_is_lost = false;
    *lstm_ext::cuda::timeout_record() = {};
  });
  m.def("run_launched", &run_launched, "seed"_a = 0);
  m.def("cuda_layer_forward", &lstm_ext::ops::cuda_layer_forward);
  m.def("cuda_layer_backward", &lstm_ext::ops::cuda_layer_backward, "steps"_a, "saved"_a, "grads"_a, "needs"_a,
        "tf32"_a, "strategy"_a, "normed"_a = py::none(), "scales"_a = py::none());
  m.def("cuda_h_before", &lstm_ext::ops::cuda_h_before);
  m.def("cuda_step_forward", &lstm_ext::ops::cuda_step_forward);
  m.def("cuda_plan", &lstm_ext::ops::cuda_plan, "T"_a, "B"_a, "H"_a, "P"_a, "projected"_a, "dtype"_a, "tf32"_a,
        "num_directions"_a, "backward"_a, "strategy"_a, "device"_a, "cell"_a = py::none());
  m.def("cuda_take_hooks", &lstm_ext::ops::cuda_take_hooks);
  m.def("cuda_set_measured", &lstm_ext::ops::cuda_set_measured);
  m.def("cuda_device", &lstm_ext::ops::cuda_device);
  m.def("sm_margin", &lstm_ext::cuda::sm_margin);
  m.def("set_sm_margin", &lstm_ext::cuda::set_sm_margin);
  m.def("spoil_kernels", [](const py::args& parts) { spoil_kernels(parts.cast<std::vector<std::string>>()); });
  m.def("contexts", &contexts);
  m.def("refusal", [] { return lstm_ext::cuda::device_report().reason; });
  m.def("runs_on", &lstm_ext::cuda::runs_on);
  m.def("occupancy_queries", &occupancy_queries);
  m.def("broken_kernels", &broken_kernels);
  m.def("run_broken_kernel", &run_broken_kernel, "name"_a, "broken"_a, "seed"_a);
  m.def("mma", &mma, "kind"_a, "a"_a, "b"_a, "d"_a);
  m.def("ldmatrix", &ldmatrix_of, "rows"_a, "transposed"_a);
  m.def("stream_order", &stream_order, "seed"_a);
}
