#include "layer.h"

#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <tuple>

#include "kernels.h"

namespace lstm_ext::cuda {
namespace {

constexpr size_t kMostPlans = 1024;  // that are kept

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

// As Problem has it.
int resident_blocks(const Problem& problem, Strategy strategy, int batch_tiles, int cluster, int64_t shared_bytes) {
  LaunchConfig config;
  config.grid_x = config.cluster = cluster;
  config.threads = kThreads;
  config.shared_bytes = shared_bytes;
  return with_kernel(kernels(problem.arithmetic, batch_tiles), strategy, problem.backward, [&](const auto& kernel) {
    prepare(kernel);
    return cluster > 1 ? active_clusters(kernel, config)
                       : problem.device.sms * blocks_per_sm(kernel, kThreads, shared_bytes);
  });
}

Plan plan_on(const SequenceShape& shape, int directions, bool backward, const LayerOptions& options,
             const DeviceLimits& device) {
  const Arithmetic arithmetic = arithmetic_of(options.dtype, options.tf32, device.compute_capability);
  Plan plan = make_plan({arithmetic, shape, directions, backward, device, resident_blocks}, options.strategy);
  plan.kernels = &kernels(arithmetic, plan.batch_tiles);
  with_kernel(*plan.kernels, plan.strategy, backward, [](const auto& kernel) { prepare(kernel); });
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
  using Key =
      std::tuple<int, int64_t, int64_t, int64_t, int64_t, bool, int, bool, Dtype, bool, std::optional<Strategy>>;
  static std::mutex mutex;
  static std::map<Key, std::shared_ptr<const Plan>> plans;
  const Key key{device,     shape.T,  shape.B,       shape.H,      shape.P,         shape.projected,
                directions, backward, options.dtype, options.tf32, options.strategy};
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto known = plans.find(key); known != plans.end()) return known->second;
  auto plan = std::make_shared<const Plan>(plan_on(shape, directions, backward, options, device_limits(device)));
  if (plans.size() >= kMostPlans) plans.clear();  // batches and lengths may never come again
  return plans[key] = std::move(plan);
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
