#include "norm_layer.h"

#include <algorithm>

#include "kernels.h"
#include "step_launches.h"

namespace lstm_ext::cuda {
namespace {

constexpr int64_t kMostBlocksBefore = 1 << 16;  // each takes one row of a step after the other

// What a product of any step has in common with all others.
template <class Layer>
StepSums sums_of(const Layer& layer, const Plan& plan, int part, int64_t columns, void* sums) {
  StepSums params{};
  params.shape = layer.shape;
  params.masks = layer.masks;
  params.packed_offset = layer.gates_map.packed_offset;
  params.part = plan.part[part];
  params.columns = columns;
  for (int d = 0; d < layer.num_directions; ++d) params.direction[d].reverse = layer.direction[d].reverse;
  params.sums = sums;
  return params;
}

// h of all rows as step s of a cell with recurrent dropout multiplies it.
void* h_state(const NormForward& of, const Plan& plan, int64_t s, int d) {
  const auto [T, B, I, H, P, projected] = of.layer.shape;
  const int64_t before = (s % 2 * of.layer.num_directions + d) * B * P;
  return static_cast<char*>(of.cell.h_state) + before * tile_sizes(plan.arithmetic).number_bytes;
}

// h of step s - 1 as step s multiplies it.
StepSums sums_of_h(const NormForward& of, const Plan& plan) {
  const LayerForward& layer = of.layer;
  const auto [T, B, I, H, P, projected] = layer.shape;
  StepSums params = sums_of(layer, plan, 0, P, of.rows);
  params.s = of.s;
  params.operand = StepSums::Operand::kBefore;
  const Matrix& h0 = layer.direction[0].state.h0;
  const bool dropped = of.cell.h_state && (of.s > 0 || h0.data);
  params.operand_map = dropped ? RowMap{0, P, nullptr} : of.s == 0 ? RowMap{0, h0.row_stride, nullptr} : layer.y_map;
  for (int d = 0; d < layer.num_directions; ++d) {
    const ForwardDirection& from = layer.direction[d];
    params.direction[d].weights = from.weights.w_hh;
    params.direction[d].operand = dropped ? h_state(of, plan, of.s, d) : of.s == 0 ? from.state.h0.data : from.y;
  }
  return params;
}

// w_hh' with the gradients of the sums of step s + 1, or w_hr' with that of h of step s.
StepSums sums_of_grads(const NormBackward& of, const Plan& plan) {
  const BackwardPass& pass = of.pass;
  const auto [T, B, I, H, P, projected] = pass.layer.shape;
  StepSums params = sums_of(pass.layer, plan, projected ? 1 : 0, projected ? P : 4 * H, of.rows);
  params.s = of.s;
  params.operand = projected ? StepSums::Operand::kThis : StepSums::Operand::kAfter;
  params.operand_map = projected ? pass.h_map : pass.d_gates_map;
  for (int d = 0; d < pass.layer.num_directions; ++d) {
    const LayerWeights& weights = pass.layer.direction[d].weights;
    params.direction[d].weights = projected ? weights.w_hr : weights.w_hh;
    params.direction[d].operand = projected ? pass.outputs[d].d_h : of.s + 1 < T ? pass.outputs[d].d_gates : nullptr;
  }
  return params;
}

// h0 as step 0 multiplies it.
WithCell<StepsBefore> before_first(const NormForward& of, const Plan& plan) {
  const LayerForward& layer = of.layer;
  const auto [T, B, I, H, P, projected] = layer.shape;
  WithCell<StepsBefore> params{{layer.shape, layer.masks, layer.gates_map.packed_offset, 1, {0, P, nullptr}, {}},
                               of.cell};
  for (int d = 0; d < layer.num_directions; ++d) {
    const ForwardDirection& from = layer.direction[d];
    params.direction[d] = {from.reverse, from.state, h_state(of, plan, 0, d)};
  }
  return params;
}

}  // namespace

KernelNorm kernel_norm(const LayerCell& cell, const Plan& plan) {
  const bool in_shared = plan.rows.shared_bytes > row_sums_bytes(tile_sizes(plan.arithmetic).sum_bytes);
  KernelNorm norm{cell.options.norm, cell.options.norm_epsilon, in_shared, {}};
  for (int d = 0; d < 2; ++d) {
    const auto& from = cell.direction[d];
    norm.direction[d] = {from.gamma, from.beta, from.gamma_h, from.beta_h};
  }
  return norm;
}

LaunchConfig config_before(const StepsBefore& params, int directions, Arithmetic arithmetic) {
  LaunchConfig config;
  config.grid_x = static_cast<int>(std::min(params.steps * params.shape.B, kMostBlocksBefore));
  config.grid_y = directions;
  config.threads = row_threads(params.shape.P, tile_sizes(arithmetic).sum_bytes);
  return config;
}

void norm_layer_forward(NormForward params, const Plan& plan, void* stream) {
  const NormKernelSet& kernels = *plan.norm_kernels;
  const LayerForward& layer = params.layer;
  StepLaunches launches(stream);
  params.part = plan.part[1];
  if (params.cell.h_state && layer.direction[0].state.h0.data) {
    const WithCell<StepsBefore> first = before_first(params, plan);
    launches.launch(kernels.h_before, config_before(first, layer.num_directions, plan.arithmetic), first);
  }
  for (params.s = 0; params.s < layer.shape.T; ++params.s) {
    launches.launch(kernels.sums[plan.cell->tensorflow], plan.config[0], sums_of_h(params, plan));
    launches.launch(kernels.forward, plan.rows, params);
    if (layer.shape.projected)
      launches.launch(plan.cell_kernels->step_forward, plan.config[1], static_cast<WithCell<StepForward>&>(params));
  }
}

void norm_layer_backward(NormBackward params, const Plan& plan, void* stream) {
  const NormKernelSet& kernels = *plan.norm_kernels;
  const LayerBackward& layer = params.pass.layer;
  const bool projected = layer.shape.projected;
  StepLaunches launches(stream);
  params.part = plan.part[0];
  const auto launch_of_h = [&] {
    launches.launch(plan.cell_kernels->step_backward, plan.config[0], static_cast<WithCell<StepBackward>&>(params));
  };
  for (params.s = layer.shape.T - 1; params.s >= 0; --params.s) {
    if (projected) launch_of_h();
    launches.launch(kernels.sums[!plan.cell->tensorflow], plan.config[projected], sums_of_grads(params, plan));
    launches.launch(kernels.backward, plan.rows, params);
  }
  if (layer.direction[0].dh0) launch_of_h();  // s is -1
}

}  // namespace lstm_ext::cuda
