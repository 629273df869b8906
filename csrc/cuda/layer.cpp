#include "layer.h"

#include <map>
#include <memory>
#include <mutex>
#include <tuple>

#include "kernels.h"

namespace lstm_ext::cuda {
namespace {

constexpr size_t kMostPlans = 1024;  // that are kept

const KernelSet& kernels(Arithmetic arithmetic, int column_tiles) {
  switch (arithmetic) {
    case Arithmetic::kBf16: return bf16_kernels(column_tiles);
    case Arithmetic::kFp16: return fp16_kernels(column_tiles);
    case Arithmetic::kTf32: return tf32_kernels(column_tiles);
    case Arithmetic::kFp32: return fp32_kernels(column_tiles);
    default: return fp64_kernels(column_tiles);
  }
}

Arithmetic arithmetic_on(const LayerOptions& options, const DeviceLimits& device) {
  return arithmetic_of(options.dtype, options.tf32 && device.compute_capability >= 80);
}

int room_on_device(Arithmetic arithmetic, bool backward, int column_tiles, int cluster, int64_t shared_bytes, int sms) {
  Launch how;
  how.grid_x = how.cluster = cluster;
  how.threads = kThreads;
  how.shared_bytes = shared_bytes;
  const KernelSet& set = kernels(arithmetic, column_tiles);
  const auto room = [&](const auto& kernel) {
    return cluster > 1 ? active_clusters(kernel, how) : sms * blocks_per_sm(kernel, kThreads, shared_bytes);
  };
  return backward ? room(set.sequence_backward) : room(set.sequence_forward);
}

Question question_of(const SequenceShape& shape, int directions, bool backward, const LayerOptions& options,
                     int device) {
  const DeviceLimits& limits = device_limits(device);
  return {arithmetic_on(options, limits), shape, directions, backward, limits, room_on_device};
}

Launch how_to_launch(const Plan& plan, int directions, void* stream) {
  const Spread& spread = plan.spread;
  Launch how;
  how.grid_x = spread.ranks * spread.teams;
  how.grid_y = directions;
  how.threads = kThreads;
  how.shared_bytes = spread.shared_bytes;
  how.cluster = spread.exchange == Exchange::kCluster ? spread.ranks : 1;
  how.cooperative = spread.exchange == Exchange::kGrid;
  how.stream = stream;
  return how;
}

// The strides of the weights of a stage or part, which are those of both directions.
template <class Part>
void take_strides(Part& part, const Matrix& weights, bool transposed) {
  part.row_stride = transposed ? 1 : weights.row_stride;
  part.column_stride = transposed ? weights.row_stride : 1;
}

Spread spread_of(const Plan& plan, const LayerWeights& weights, bool backward, void* workspace, void* stream) {
  Spread spread = plan.spread;
  take_strides(spread.stage[0], weights.w_hh, backward);
  take_strides(spread.stage[1], weights.w_hr, backward);
  spread.words = static_cast<uint64_t*>(workspace);
  if (spread.exchange == Exchange::kGrid) fill_zero(workspace, plan.workspace_bytes, stream);  // no word bears a number
  return spread;
}

// The launches of one step: how to cut each part, and how to launch it.
struct Steps {
  Steps(const Question& question, const Plan& plan, const LayerWeights& weights, void* workspace, void* stream)
      : set(kernels(question.arithmetic, plan.column_tiles)), num_parts(question.shape.projected ? 2 : 1) {
    const TileSizes& sizes = tile_sizes(question.arithmetic);
    const int64_t tile = plan.column_tiles * kColumns,
                  numbers = question.directions * question.shape.B * question.shape.H;
    for (int n = 0; n < num_parts; ++n) {
      part[n] = step_part(question, n, plan.column_tiles);
      take_strides(part[n], n == 0 ? weights.w_hh : weights.w_hr, question.backward);
      how[n].grid_x = static_cast<int>(part[n].row_blocks * ((question.shape.B + tile - 1) / tile));
      how[n].grid_y = question.directions;
      how[n].threads = kThreads;
      how[n].shared_bytes = set.step_shared_bytes(part[n].warps_m);
      how[n].stream = stream;
    }
    state = workspace;
    hidden = num_parts == 2 ? static_cast<char*>(workspace) + (numbers * sizes.sum_bytes + 15) / 16 * 16 : nullptr;
  }

  const KernelSet& set;
  const int num_parts;
  StepPart part[2];
  Launch how[2];
  void *state, *hidden;
};

}  // namespace

std::shared_ptr<const Plan> plan_layer(const SequenceShape& shape, int directions, bool backward,
                                       const LayerOptions& options, int device) {
  using Key = std::tuple<int, int64_t, int64_t, int64_t, int64_t, bool, int, bool, Dtype, bool, std::string>;
  static std::mutex mutex;
  static std::map<Key, std::shared_ptr<const Plan>> plans;
  const Key key{device,     shape.T,  shape.B,       shape.H,      shape.P,         shape.projected,
                directions, backward, options.dtype, options.tf32, options.strategy};
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto known = plans.find(key); known != plans.end()) return known->second;
  const Question question = question_of(shape, directions, backward, options, device);
  auto plan = std::make_shared<const Plan>(make_plan(question, options.strategy));
  if (plans.size() >= kMostPlans) plans.clear();  // batches and lengths may never come again
  return plans[key] = std::move(plan);
}

int plan_registers(const Plan& plan, const SequenceShape& shape, bool backward, const LayerOptions& options,
                   int device) {
  const Question question = question_of(shape, 1, backward, options, device);
  const KernelSet& set = kernels(question.arithmetic, plan.column_tiles);
  if (plan.strategy == "step") return backward ? registers(set.step_backward) : registers(set.step_forward);
  return backward ? registers(set.sequence_backward) : registers(set.sequence_forward);
}

void layer_forward(const LayerForward& layer, const void* const (&xw)[2], const Plan& plan, const LayerOptions& options,
                   int device, void* workspace, void* stream) {
  if (layer.shape.B == 0) return;
  const Question question = question_of(layer.shape, layer.num_directions, false, options, device);
  const LayerWeights& weights = layer.direction[0].weights;
  if (plan.strategy != "step") {
    const SequenceForward params{layer, {xw[0], xw[1]}, spread_of(plan, weights, false, workspace, stream)};
    launch(kernels(question.arithmetic, plan.column_tiles).sequence_forward,
           how_to_launch(plan, layer.num_directions, stream), params);
    return;
  }
  const Steps steps(question, plan, weights, workspace, stream);
  for (int64_t s = 0; s < layer.shape.T; ++s) {
    for (int n = 0; n < steps.num_parts; ++n)
      launch(steps.set.step_forward, steps.how[n],
             StepForward{layer, {xw[0], xw[1]}, s, steps.part[n], steps.state, steps.hidden});
  }
}

void layer_backward(const BackwardPass& pass, const Plan& plan, const LayerOptions& options, int device,
                    void* workspace, void* stream) {
  const LayerBackward& layer = pass.layer;
  if (layer.shape.B == 0) return;
  const Question question = question_of(layer.shape, layer.num_directions, true, options, device);
  const LayerWeights& weights = layer.direction[0].weights;
  if (plan.strategy != "step") {
    const SequenceBackward params{pass, spread_of(plan, weights, true, workspace, stream)};
    launch(kernels(question.arithmetic, plan.column_tiles).sequence_backward,
           how_to_launch(plan, layer.num_directions, stream), params);
    return;
  }
  const Steps steps(question, plan, weights, workspace, stream);
  for (int64_t s = layer.shape.T - 1; s >= 0; --s) {
    for (int n = 0; n < steps.num_parts; ++n)
      launch(steps.set.step_backward, steps.how[n], StepBackward{pass, s, steps.part[n], steps.state});
  }
  if (layer.direction[0].dh0)
    launch(steps.set.step_backward, steps.how[0], StepBackward{pass, -1, steps.part[0], steps.state});
}

}  // namespace lstm_ext::cuda
