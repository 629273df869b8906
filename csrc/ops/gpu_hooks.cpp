#if defined(LSTM_EXT_WITH_CUDA)
#include "gpu_hooks.h"

#include <pybind11/stl.h>

#include <map>
#include <set>
#include <utility>
#include <vector>

#include "../array.h"
#include "../cuda/kernel_check.h"

namespace lstm_ext::ops {
namespace {

struct Hooks {
  py::object introduce = py::none(), check = py::none();
  std::set<int> introduced;
};

Hooks& hooks() {
  static auto* const all = new Hooks;  // the interpreter may end first
  return *all;
}

const char* dtype_of(cuda::Arithmetic arithmetic) {
  switch (arithmetic) {
    case cuda::Arithmetic::kBf16: return "bfloat16";
    case cuda::Arithmetic::kFp16: return "float16";
    case cuda::Arithmetic::kFp64: return "float64";
    default: return "float32";
  }
}

// Which cell's kernel it is, as CELLS of lstm_ext/self_check.py names it.
std::string cell_of(const cuda::Plan& plan) {
  if (!plan.cell) return "";
  const char* const norms[] = {"", ", rows", ", gates"};
  return std::string(plan.cell->tensorflow ? "TensorFlow" : "torch") + norms[static_cast<int>(plan.cell->norm)];
}

// What Python finds out about the kernel of a plan; None for nothing yet.
py::object check_kernel(const cuda::Plan& plan, bool projected, int device) {
  const std::string forced = std::string(cuda::name_of(plan.strategy)) + "/" + std::to_string(plan.batch_tiles);
  return hooks().check(device, cuda::plan_kernel(plan), dtype_of(plan.arithmetic),
                       plan.arithmetic == cuda::Arithmetic::kTf32, forced, projected, plan.backward, cell_of(plan));
}

}  // namespace

void cuda_take_hooks(py::object introduce, py::object check) { hooks() = {std::move(introduce), std::move(check), {}}; }

void cuda_set_measured(int device, const py::list& rows) {
  std::vector<cuda::MeasuredTimes> measured;
  const int capability = cuda::device_limits(device).compute_capability;
  for (const py::handle each : rows) {
    using Row = std::tuple<std::string, bool, int, bool, int64_t, int64_t, int64_t, int64_t, std::string,
                           std::map<std::string, double>>;
    const auto [dtype, tf32, directions, backward, T, B, H, P, date, times] = each.cast<Row>();
    cuda::MeasuredTimes row{
        cuda::arithmetic_of(dtype_named(dtype), tf32, capability), directions, backward, T, B, H, P, date, {}};
    for (const auto& [strategy, microseconds] : times) {
      if (const auto named = cuda::forced_by(strategy).strategy) row.microseconds.emplace_back(*named, microseconds);
    }
    measured.push_back(std::move(row));
  }
  cuda::set_measured(device, std::move(measured));
}

py::dict cuda_device(int device) {
  const cuda::DeviceLimits& limits = cuda::device_limits(device);
  py::dict result;
  result["name"] = cuda::device_name(device);
  result["compute_capability"] = limits.compute_capability;
  result["sms"] = limits.sms;
  result["driver"] = cuda::driver_version();
  return result;
}

void introduce(int device) {
  if (!hooks().introduce.is_none() && hooks().introduced.insert(device).second) hooks().introduce(device);
}

std::shared_ptr<const cuda::Plan> plan_to_launch(const SequenceShape& shape, int directions, bool backward,
                                                 const cuda::LayerOptions& options, int device, std::string& refused) {
  introduce(device);
  try {
    for (;;) {
      std::shared_ptr<const cuda::Plan> plan = cuda::plan_layer(shape, directions, backward, options, device);
      const bool is_checked = plan->check->verdict != cuda::Verdict::kUnknown || options.forced.batch_tiles;
      if (is_checked || hooks().check.is_none()) return plan;
      const py::object wrong = check_kernel(*plan, shape.projected, device);
      if (wrong.is_none()) return plan;
      cuda::set_verdict(*plan, wrong.cast<std::string>());
    }
  } catch (const cuda::RefusedError& error) {
    refused = error.what();
    return nullptr;
  }
}

}  // namespace lstm_ext::ops

#endif
