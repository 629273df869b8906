#include "layer.h"

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>

#include "kernel_check.h"
#include "kernels.h"
#include "norm_layer.h"
#include "step_launches.h"

namespace lstm_ext::cuda {
namespace {

using PlanKey = std::tuple<int, int64_t, int64_t, int64_t, int64_t, bool, int, bool, Dtype, bool, Forced, int,
                           std::optional<CellTraits>>;

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

const CellKernelSet& cell_kernels(Arithmetic arithmetic, bool tensorflow) {
  switch (arithmetic) {
    case Arithmetic::kBf16: return bf16_cell_kernels(tensorflow);
    case Arithmetic::kFp16: return fp16_cell_kernels(tensorflow);
    case Arithmetic::kTf32: return tf32_cell_kernels(tensorflow);
    case Arithmetic::kFp32: return fp32_cell_kernels(tensorflow);
    default: return fp64_cell_kernels(tensorflow);
  }
}

const NormKernelSet& norm_kernels(Arithmetic arithmetic, Norm norm, bool tensorflow) {
  switch (arithmetic) {
    case Arithmetic::kBf16: return bf16_norm_kernels(norm, tensorflow);
    case Arithmetic::kFp16: return fp16_norm_kernels(norm, tensorflow);
    case Arithmetic::kTf32: return tf32_norm_kernels(norm, tensorflow);
    case Arithmetic::kFp32: return fp32_norm_kernels(norm, tensorflow);
    default: return fp64_norm_kernels(norm, tensorflow);
  }
}

// Calls body with the kernel of a set that a strategy launches; kernels of different passes have different types.
template <class Set, class Body>
auto with_kernel_of(const Set& set, Strategy strategy, bool backward, const Body& body) {
  if (strategy == Strategy::kStep) return backward ? body(set.step_backward) : body(set.step_forward);
  const int exchange = static_cast<int>(exchange_of(strategy));
  return backward ? body(set.sequence_backward[exchange]) : body(set.sequence_forward[exchange]);
}

// Of cells that normalise. For a step it is the one for the rows, which stands for those that go with it.
template <class Body>
auto with_kernel_of(const NormKernelSet& set, Strategy strategy, bool backward, const Body& body) {
  if (strategy == Strategy::kStep) return backward ? body(set.backward) : body(set.forward);
  const int exchange = static_cast<int>(exchange_of(strategy));
  return backward ? body(set.sequence_backward[exchange]) : body(set.sequence_forward[exchange]);
}

template <class Body>
auto with_kernel(const Problem& problem, Strategy strategy, int batch_tiles, const Body& body) {
  const bool backward = problem.backward;
  if (problem.normalises())
    return with_kernel_of(norm_kernels(problem.arithmetic, problem.cell->norm, problem.cell->tensorflow), strategy,
                          backward, body);
  if (!problem.cell) return with_kernel_of(kernels(problem.arithmetic, batch_tiles), strategy, backward, body);
  return with_kernel_of(cell_kernels(problem.arithmetic, problem.cell->tensorflow), strategy, backward, body);
}
template <class Body>
auto with_kernel(const Plan& plan, const Body& body) {
  if (plan.norm_kernels) return with_kernel_of(*plan.norm_kernels, plan.strategy, plan.backward, body);
  if (plan.kernels) return with_kernel_of(*plan.kernels, plan.strategy, plan.backward, body);
  return with_kernel_of(*plan.cell_kernels, plan.strategy, plan.backward, body);
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

// As Problem has it, of the kernels whose launches are cut into tiles.
int resident_blocks(const Problem& of, Strategy strategy, int tiles, int device, int cluster, int64_t shared_bytes) {
  const auto count = [&](const auto& kernel) {
    return (cluster > 1 ? 1 : of.device.sms) * resident(kernel, device, shared_bytes, cluster);
  };
  if (!of.normalises() || strategy != Strategy::kStep) return with_kernel(of, strategy, tiles, count);
  const CellTraits& cell = *of.cell;
  const NormKernelSet& kernels = norm_kernels(of.arithmetic, cell.norm, cell.tensorflow);
  const int of_sums = count(kernels.sums[of.backward != cell.tensorflow]);
  if (!of.shape.projected) return of_sums;
  return std::min(of_sums, with_kernel_of(cell_kernels(of.arithmetic, cell.tensorflow), strategy, of.backward, count));
}

// What the device must know of each kernel of a plan before its first launch.
void prepare_kernels(const Plan& plan) {
  with_kernel(plan, [](const auto& kernel) { prepare(kernel); });
  if (!plan.norm_kernels || plan.strategy != Strategy::kStep) return;
  for (const auto& kernel : plan.norm_kernels->sums) prepare(kernel);
  with_kernel_of(*plan.cell_kernels, plan.strategy, plan.backward, [](const auto& kernel) { prepare(kernel); });
}

// The mutex is held.
Plan plan_on(const SequenceShape& shape, int directions, bool backward, const LayerOptions& options, int device,
             int margin) {
  const DeviceLimits& limits = device_limits(device);
  const Arithmetic arithmetic = arithmetic_of(options.dtype, options.tf32, limits.compute_capability);
  Problem problem{arithmetic, shape, directions, backward, limits, {}};
  problem.cell = options.cell;
  problem.resident_blocks = [device](const Problem& of, Strategy strategy, int tiles, int cluster, int64_t shared) {
    return resident_blocks(of, strategy, tiles, device, cluster, shared);
  };
  problem.refusal = [&](Strategy strategy, int batch_tiles) {
    const auto wrong = [&](const auto& kernel) {
      const KernelCheck& check = kernel_check(device, kernel.name);
      return check.verdict == Verdict::kWrong ? kernel.name + (": " + check.why) : std::string();
    };
    const std::string own = with_kernel(problem, strategy, batch_tiles, wrong);
    if (!own.empty() || !problem.normalises() || strategy != Strategy::kStep) return own;
    // Its steps have kernels of other cells besides.
    return with_kernel_of(cell_kernels(arithmetic, problem.cell->tensorflow), strategy, backward, wrong);
  };
  problem.sm_margin = margin;
  const auto found = known().measured.find(device);
  if (found != known().measured.end() && !options.cell)  // those are times of the plain LSTM
    problem.measured = &found->second;
  Plan plan = make_plan(problem, options.forced);
  if (options.cell) {
    plan.cell_kernels = &cell_kernels(arithmetic, options.cell->tensorflow);
    if (options.cell->normalises())
      plan.norm_kernels = &norm_kernels(arithmetic, options.cell->norm, options.cell->tensorflow);
  } else {
    plan.kernels = &kernels(arithmetic, plan.batch_tiles);
  }
  prepare_kernels(plan);
  plan.check = &kernel_check(device, plan_kernel(plan));
  return plan;
}

// The weights of a product lie where the call says, with the same strides in both directions. Backward reads them
// transposed, and TensorFlow's are.
void set_strides(ProductLayout& product, const Matrix& weights, bool transposed) {
  product.row_stride = transposed ? 1 : weights.row_stride;
  product.column_stride = transposed ? weights.row_stride : 1;
}

// The layout of a launch for all T.
Layout layout_of(const Plan& plan, const LayerWeights& weights, bool tensorflow, const char* kernel, void* workspace,
                 void* stream) {
  Layout layout = plan.layout;
  layout.timeout = timeout_record();
  layout.kernel = kernel;
  set_strides(layout.product[0], weights.w_hh, plan.backward != tensorflow);
  set_strides(layout.product[1], weights.w_hr, plan.backward);
  layout.mail = static_cast<char*>(workspace);
  if (layout.exchange == Exchange::kGrid) fill_zero(workspace, plan.workspace_bytes, stream);  // no word bears a number
  return layout;
}

// A caller that mixes its plans up would launch another kernel than it has filled the params of.
void expect_pass(const Plan& plan, bool backward, const LayerCell* cell) {
  if (plan.backward != backward || !plan.kernels != !!cell)
    throw std::logic_error("lstm_ext: a plan of the other pass, or of another kind of cell");
}

// ---- Cells with options

template <class Sum>
CellNumbers<Sum> numbers_of(const Cell& cell) {
  const auto spec = [](const ActivationSpec& of) {
    return typename CellNumbers<Sum>::Spec{of.kind, static_cast<Sum>(of.alpha), static_cast<Sum>(of.beta)};
  };
  return {spec(cell.activation),
          spec(cell.recurrent_activation),
          static_cast<Sum>(cell.forget_bias),
          static_cast<Sum>(cell.cell_clip),
          static_cast<Sum>(cell.proj_clip),
          static_cast<Sum>(cell.zoneout_h),
          static_cast<Sum>(cell.zoneout_c),
          static_cast<Sum>(dropout_scale(cell.recurrent_dropout)),
          static_cast<Sum>(dropout_scale(cell.candidate_dropout))};
}

void* h_state_of(const Plan& plan, void* workspace) {
  return plan.workspace_bytes > plan.h_state_offset ? static_cast<char*>(workspace) + plan.h_state_offset : nullptr;
}

KernelCell kernel_cell(const LayerCell& layer, void* h_state) {
  const Cell& cell = layer.options;
  const auto zoneout = [&](double probability) {
    return Zoneout{probability > 0, cell.training, Chance::of(probability)};
  };
  const auto dropped = [&](double probability) { return Chance::of(cell.training ? probability : 0); };
  KernelCell kernel{numbers_of<float>(cell),
                    numbers_of<double>(cell),
                    cell.coupled,
                    cell.tensorflow,
                    CellTraits::of(cell).draws > 0,
                    zoneout(cell.zoneout_h),
                    zoneout(cell.zoneout_c),
                    dropped(cell.recurrent_dropout),
                    dropped(cell.candidate_dropout),
                    layer.seed,
                    {},
                    layer.y_map,
                    h_state};
  for (int n = 0; n < 2; ++n) kernel.direction[n] = {layer.direction[n].peephole, layer.direction[n].y, {}};
  return kernel;
}

// ---- Launches

// All T in one launch. `with` makes the params of a kernel from those of the plain LSTM.
template <class Set, class With>
void forward_in_one(const Set& kernels, const LayerForward& layer, const void* const (&xw)[2], const Plan& plan,
                    void* workspace, void* stream, const With& with) {
  const auto& kernel = kernels.sequence_forward[static_cast<int>(plan.layout.exchange)];
  const bool tensorflow = layer.cell && layer.cell->options.tensorflow;
  const Layout layout = layout_of(plan, layer.direction[0].weights, tensorflow, kernel.name, workspace, stream);
  launch(kernel, plan.config[0], with(SequenceForward{layer, {xw[0], xw[1]}, layout}), stream);
}

template <class Set, class With>
void forward_by(const Set& kernels, const LayerForward& layer, const void* const (&xw)[2], const Plan& plan,
                void* workspace, void* stream, const With& with) {
  if (plan.strategy != Strategy::kStep) return forward_in_one(kernels, layer, xw, plan, workspace, stream, with);
  // The parts of a step follow each other in stream order, and wait for each other.
  void* hidden = layer.shape.projected ? static_cast<char*>(workspace) + plan.hidden_offset : nullptr;
  StepLaunches launches(stream);
  const auto take_part = [&](int64_t s, int n) {
    launches.launch(kernels.step_forward, plan.config[n],
                    with(StepForward{layer, {xw[0], xw[1]}, s, plan.part[n], workspace, hidden}));
  };
  if (plan.cell && plan.cell->drops_h && layer.direction[0].state.h0.data) take_part(-1, plan.num_parts - 1);
  for (int64_t s = 0; s < layer.shape.T; ++s)
    for (int n = 0; n < plan.num_parts; ++n) take_part(s, n);
}

template <class Set, class With>
void backward_in_one(const Set& kernels, const BackwardPass& pass, const Plan& plan, void* workspace, void* stream,
                     const With& with) {
  const auto& kernel = kernels.sequence_backward[static_cast<int>(plan.layout.exchange)];
  const bool tensorflow = pass.layer.cell && pass.layer.cell->options.tensorflow;
  const Layout layout = layout_of(plan, pass.layer.direction[0].weights, tensorflow, kernel.name, workspace, stream);
  launch(kernel, plan.config[0], with(SequenceBackward{pass, layout}), stream);
}

template <class Set, class With>
void backward_by(const Set& kernels, const BackwardPass& pass, const Plan& plan, void* workspace, void* stream,
                 const With& with) {
  if (plan.strategy != Strategy::kStep) return backward_in_one(kernels, pass, plan, workspace, stream, with);
  const LayerBackward& layer = pass.layer;
  StepLaunches launches(stream);
  const auto take_part = [&](int64_t s, int n) {
    launches.launch(kernels.step_backward, plan.config[n], with(StepBackward{pass, s, plan.part[n], workspace}));
  };
  for (int64_t s = layer.shape.T - 1; s >= 0; --s)
    for (int n = 0; n < plan.num_parts; ++n) take_part(s, n);
  if (layer.direction[0].dh0) take_part(-1, 0);  // step 0 has left the d_gates from which dh0 comes
}

constexpr auto as_they_are = [](const auto& params) { return params; };

}  // namespace

std::shared_ptr<const Plan> plan_layer(const SequenceShape& shape, int directions, bool backward,
                                       const LayerOptions& options, int device) {
  const int margin = sm_margin();
  const PlanKey key{
      device,   planned_steps(shape.T), shape.B,      shape.H,        shape.P, shape.projected, directions,
      backward, options.dtype,          options.tf32, options.forced, margin,  options.cell};
  const std::lock_guard<std::mutex> lock(known().mutex);
  auto& plans = known().plans;
  if (const auto found = plans.find(key); found != plans.end()) return found->second;
  auto plan = std::make_shared<const Plan>(plan_on(shape, directions, backward, options, device, margin));
  if (plans.size() >= kMostPlans) plans.clear();  // batches and lengths may never come again
  return plans[key] = std::move(plan);
}

const char* plan_kernel(const Plan& plan) {
  return with_kernel(plan, [](const auto& kernel) { return kernel.name; });
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
  return with_kernel(plan, [](const auto& kernel) { return registers(kernel); });
}

void layer_forward(const LayerForward& layer, const void* const (&xw)[2], const Plan& plan, void* workspace,
                   void* stream) {
  expect_pass(plan, false, layer.cell);
  if (layer.shape.B == 0) return;
  if (!layer.cell) return forward_by(*plan.kernels, layer, xw, plan, workspace, stream, as_they_are);
  const KernelCell cell = kernel_cell(*layer.cell, h_state_of(plan, workspace));
  if (plan.norm_kernels) {
    const KernelNorm norm = kernel_norm(*layer.cell, plan);
    if (plan.strategy != Strategy::kStep)
      return forward_in_one(*plan.norm_kernels, layer, xw, plan, workspace, stream,
                            [&](const SequenceForward& params) { return NormSequenceForward{{params, cell}, norm}; });
    const auto at = [&](int64_t offset) { return static_cast<char*>(workspace) + offset; };
    void* const hidden = layer.shape.projected ? at(plan.hidden_offset) : nullptr;
    const StepForward step{layer, {xw[0], xw[1]}, 0, {}, workspace, hidden};
    return norm_layer_forward({{step, cell}, norm, at(plan.rows_offset)}, plan, stream);
  }
  forward_by(*plan.cell_kernels, layer, xw, plan, workspace, stream,
             [&](const auto& params) { return WithCell<std::decay_t<decltype(params)>>{params, cell}; });
}

void layer_backward(const BackwardPass& pass, const BackwardCellArrays& arrays, const Plan& plan, void* workspace,
                    void* stream) {
  const LayerCell* const layer_cell = pass.layer.cell;
  expect_pass(plan, true, layer_cell);
  if (pass.layer.shape.B == 0) return;
  if (!layer_cell) return backward_by(*plan.kernels, pass, plan, workspace, stream, as_they_are);
  KernelCell cell = kernel_cell(*layer_cell, h_state_of(plan, workspace));
  for (int n = 0; n < 2; ++n) cell.direction[n].outputs = arrays.cells[n];
  if (plan.norm_kernels) {
    const KernelNorm norm = kernel_norm(*layer_cell, plan);
    const auto& [first, second] = arrays.normed;
    if (plan.strategy != Strategy::kStep)
      return backward_in_one(*plan.norm_kernels, pass, plan, workspace, stream, [&](const SequenceBackward& params) {
        return NormSequenceBackward{{params, cell}, norm, arrays.scales_map, {first, second}};
      });
    const StepBackward step{pass, 0, {}, workspace};
    void* const rows = static_cast<char*>(workspace) + plan.rows_offset;
    return norm_layer_backward({{step, cell}, norm, rows, arrays.scales_map, {first, second}}, plan, stream);
  }
  backward_by(*plan.cell_kernels, pass, plan, workspace, stream,
              [&](const auto& params) { return WithCell<std::decay_t<decltype(params)>>{params, cell}; });
}

void layer_h_before(const StepsBefore& steps, const LayerCell& cell, Arithmetic arithmetic, int directions,
                    void* stream) {
  const Cell& options = cell.options;
  if (steps.shape.B == 0) return;
  const WithCell<StepsBefore> params{steps, kernel_cell(cell, nullptr)};
  launch(norm_kernels(arithmetic, options.norm, options.tensorflow).h_before,
         config_before(params, directions, arithmetic), params, stream);
}

}  // namespace lstm_ext::cuda
