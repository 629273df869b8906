#include "layer.h"

#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "kernel_check.h"
#include "kernels.h"

namespace lstm_ext::cuda {
namespace {

using PlanKey = std::tuple<int, int64_t, int64_t, int64_t, int64_t, bool, int, bool, Dtype, bool, Forced, int>;

constexpr size_t kMostPlans = 1024;  // that are kept

// What threads share, under one mutex.
struct Known {
  std::mutex mutex;
  std::map<PlanKey, std::shared_ptr<const Plan>> plans;
  std::map<int, std::vector<MeasuredTimes>> measured;                  // on a device
  std::map<std::tuple<int, const void*, int64_t, int>, int> resident;  // of a kernel, by shared memory and cluster
};
Known& known() {
  static auto* const all = new Known;  // threads may outlive statics
  return *all;
}

const KernelSet& kernels(Arithmetic arithmetic, int batch_tiles) {
  switch (arithmetic) {
    case Arithmetic::kBf16: return bf16_kernels(batch_tiles);
    case Arithmetic::kFp16: return fp16_kernels(batch_tiles);
    case Arithmetic::kTf32: return tf32_kernels(batch_tiles);
    case Arithmetic::kFp32: return fp32_kernels(batch_tiles);
    default: return fp64_kernels(batch_tiles);
  }
}

// Calls body with the kernel of a set that a strategy launches; kernels of different passes have different types.
template <class Body>
auto with_kernel(const KernelSet& set, Strategy strategy, bool backward, const Body& body) {
  if (strategy == Strategy::kStep) return backward ? body(set.step_backward) : body(set.step_forward);
  const int exchange = static_cast<int>(exchange_of(strategy));
  return backward ? body(set.sequence_backward[exchange]) : body(set.sequence_forward[exchange]);
}

// Of a kernel on the current device: clusters of a size at a time, or blocks of a multiprocessor. The runtime is asked
// once: a search asks for the same again and again.
template <class Params>
int resident(const Kernel<Params>& kernel, int device, int64_t shared_bytes, int cluster) {
  const auto [place, is_new] = known().resident.try_emplace({device, kernel.entry(), shared_bytes, cluster});
  if (!is_new) return place->second;
  try {
    LaunchConfig config;
    config.grid_x = config.cluster = cluster;
    config.threads = kThreads;
    config.shared_bytes = shared_bytes;
    prepare(kernel);
    return place->second =
               cluster > 1 ? active_clusters(kernel, config) : blocks_per_sm(kernel, kThreads, shared_bytes);
  } catch (...) {
    known().resident.erase(place);
    throw;
  }
}

// The mutex is held.
Plan plan_on(const SequenceShape& shape, int directions, bool backward, const LayerOptions& options, int device,
             int margin) {
  const DeviceLimits& limits = device_limits(device);
  const Arithmetic arithmetic = arithmetic_of(options.dtype, options.tf32, limits.compute_capability);
  Problem problem{arithmetic, shape, directions, backward, limits, {}};
  // Only the kernels of the pass for all T are asked about.
  problem.resident_blocks = [device](const Problem& of, Strategy strategy, int tiles, int cluster, int64_t shared) {
    return with_kernel(kernels(of.arithmetic, tiles), strategy, of.backward, [&](const auto& kernel) {
      return (cluster > 1 ? 1 : of.device.sms) * resident(kernel, device, shared, cluster);
    });
  };
  problem.refusal = [&](Strategy strategy, int batch_tiles) {
    return with_kernel(kernels(arithmetic, batch_tiles), strategy, backward, [&](const auto& kernel) {
      const KernelCheck& check = kernel_check(device, kernel.name);
      return check.verdict == Verdict::kWrong ? kernel.name + (": " + check.why) : std::string();
    });
  };
  problem.sm_margin = margin;
  if (const auto found = known().measured.find(device); found != known().measured.end())
    problem.measured = &found->second;
  Plan plan = make_plan(problem, options.forced);
  plan.kernels = &kernels(arithmetic, plan.batch_tiles);
  with_kernel(*plan.kernels, plan.strategy, backward, [](const auto& kernel) { prepare(kernel); });
  plan.check = &kernel_check(device, plan_kernel(plan));
  return plan;
}

// The weights of a product lie where the call says, with the same strides in both directions. Backward reads them
// transposed.
void set_strides(ProductLayout& product, const Matrix& weights, bool transposed) {
  product.row_stride = transposed ? 1 : weights.row_stride;
  product.column_stride = transposed ? weights.row_stride : 1;
}

// The layout of a launch for all T.
Layout layout_of(const Plan& plan, const LayerWeights& weights, const char* kernel, void* workspace, void* stream) {
  Layout layout = plan.layout;
  layout.timeout = timeout_record();
  layout.kernel = kernel;
  set_strides(layout.product[0], weights.w_hh, plan.backward);
  set_strides(layout.product[1], weights.w_hr, plan.backward);
  layout.words = static_cast<uint64_t*>(workspace);
  if (layout.exchange == Exchange::kGrid) fill_zero(workspace, plan.workspace_bytes, stream);  // no word bears a number
  return layout;
}

// The launches of steps, one after the other. Each but the first may begin while the one before it still runs, where
// the device can do that; what runs before the first is not ours, and may not be overlapped.
class StepLaunches {
 public:
  StepLaunches(const Plan& plan, void* stream) : plan_(plan), stream_(stream) {}

  template <class Params>
  void launch(const Kernel<Params>& kernel, int part, const Params& params) {
    LaunchConfig config = plan_.config[part];
    config.overlaps = config.overlaps && !first_;
    first_ = false;
    cuda::launch(kernel, config, params, stream_);
  }

 private:
  const Plan& plan_;
  void* stream_;
  bool first_ = true;
};

// A caller that mixes its plans up would launch another kernel than it has filled the params of.
void expect_pass(const Plan& plan, bool backward) {
  if (plan.backward != backward) throw std::logic_error("lstm_ext: a plan of the other pass");
}

}  // namespace

std::shared_ptr<const Plan> plan_layer(const SequenceShape& shape, int directions, bool backward,
                                       const LayerOptions& options, int device) {
  const int margin = sm_margin();
  const PlanKey key{device,        planned_steps(shape.T), shape.B,        shape.H,
                    shape.P,       shape.projected,        directions,     backward,
                    options.dtype, options.tf32,           options.forced, margin};
  const std::lock_guard<std::mutex> lock(known().mutex);
  auto& plans = known().plans;
  if (const auto found = plans.find(key); found != plans.end()) return found->second;
  auto plan = std::make_shared<const Plan>(plan_on(shape, directions, backward, options, device, margin));
  if (plans.size() >= kMostPlans) plans.clear();  // batches and lengths may never come again
  return plans[key] = std::move(plan);
}

const char* plan_kernel(const Plan& plan) {
  return with_kernel(*plan.kernels, plan.strategy, plan.backward, [](const auto& kernel) { return kernel.name; });
}

void set_verdict(const Plan& plan, const std::string& wrong) {
  const std::lock_guard<std::mutex> lock(known().mutex);
  if (plan.check->verdict == Verdict::kWrong) return;  // others may be reading why
  plan.check->why = wrong;
  plan.check->verdict = wrong.empty() ? Verdict::kRight : Verdict::kWrong;
  if (!wrong.empty()) known().plans.clear();
}

void set_measured(int device, std::vector<MeasuredTimes> measured) {
  const std::lock_guard<std::mutex> lock(known().mutex);
  known().measured[device] = std::move(measured);
  known().plans.clear();
}

int plan_registers(const Plan& plan) {
  return with_kernel(*plan.kernels, plan.strategy, plan.backward, [](const auto& kernel) { return registers(kernel); });
}

void layer_forward(const LayerForward& layer, const void* const (&xw)[2], const Plan& plan, void* workspace,
                   void* stream) {
  expect_pass(plan, false);
  if (layer.shape.B == 0) return;
  const LayerWeights& weights = layer.direction[0].weights;
  if (plan.strategy != Strategy::kStep) {
    const auto& kernel = plan.kernels->sequence_forward[static_cast<int>(plan.layout.exchange)];
    const SequenceForward params{layer, {xw[0], xw[1]}, layout_of(plan, weights, kernel.name, workspace, stream)};
    launch(kernel, plan.config[0], params, stream);
    return;
  }
  // The parts of a step follow each other in stream order, and wait for each other.
  void* hidden = layer.shape.projected ? static_cast<char*>(workspace) + plan.hidden_offset : nullptr;
  StepLaunches launches(plan, stream);
  for (int64_t s = 0; s < layer.shape.T; ++s) {
    for (int n = 0; n < plan.num_parts; ++n)
      launches.launch(plan.kernels->step_forward, n,
                      StepForward{layer, {xw[0], xw[1]}, s, plan.part[n], workspace, hidden});
  }
}

void layer_backward(const BackwardPass& pass, const Plan& plan, void* workspace, void* stream) {
  expect_pass(plan, true);
  const LayerBackward& layer = pass.layer;
  if (layer.shape.B == 0) return;
  const LayerWeights& weights = layer.direction[0].weights;
  if (plan.strategy != Strategy::kStep) {
    const auto& kernel = plan.kernels->sequence_backward[static_cast<int>(plan.layout.exchange)];
    const SequenceBackward params{pass, layout_of(plan, weights, kernel.name, workspace, stream)};
    launch(kernel, plan.config[0], params, stream);
    return;
  }
  StepLaunches launches(plan, stream);
  const auto take_part = [&](int64_t s, int n) {
    launches.launch(plan.kernels->step_backward, n, StepBackward{pass, s, plan.part[n], workspace});
  };
  for (int64_t s = layer.shape.T - 1; s >= 0; --s)
    for (int n = 0; n < plan.num_parts; ++n) take_part(s, n);
  if (layer.direction[0].dh0) take_part(-1, 0);  // step 0 has left the d_gates from which dh0 comes
}

}  // namespace lstm_ext::cuda
