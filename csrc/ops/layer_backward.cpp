#include "../cpu/levels.h"
#include "cpu_plan.h"
#include "gil.h"
#include "layer_args.h"
#include "ops.h"

namespace lstm_ext::ops {
namespace {

struct WeightOutputs {
  Output w_ih, w_hh, b_ih, b_hh, w_hr, peephole, gamma, beta, gamma_h, beta_h;
};

}  // namespace

py::object layer_backward(const LayerCall& call, const Saved& saved, const OutputGrads& grads, Needs needs,
                          int num_threads) {
  if (!takes(call, saved, grads)) return not_implemented();
  LayerArgs args(call);
  const auto [T, B, I, H, P, projected] = args.shape;
  BackwardArrays arrays(args, args.x, saved, grads);

  const Allocator allocator(args.x);
  const auto wanted = [&](Needs need, const Shape& shape) {
    return has(needs, need) ? allocator.empty(args.dtype, shape) : Output{};
  };
  const Output dx = wanted(Needs::kX, args.sequence_shape(I));
  const Output dh0 = wanted(Needs::kH0, args.state_shape(P));
  const Output dc0 = wanted(Needs::kC0, args.state_shape(H));
  WeightOutputs dw[2];
  py::list dweights;
  for (int n = 0; n < args.D; ++n) {
    const auto grad_of = [&](const Array& weight) {
      Output grad = weight ? wanted(Needs::kWeights, weight.shape()) : Output{};
      if (!grad.object.is_none()) dweights.append(grad.object);
      return grad;
    };
    const DirectionArrays& of = args.direction[n];
    dw[n].w_ih = grad_of(of.w_ih);  // in the order of the list
    dw[n].w_hh = grad_of(of.w_hh);
    dw[n].b_ih = grad_of(of.b_ih);
    dw[n].b_hh = grad_of(of.b_hh);
    dw[n].w_hr = grad_of(of.w_hr);
    dw[n].peephole = grad_of(of.peephole);
    dw[n].gamma = grad_of(of.gamma);
    dw[n].beta = grad_of(of.beta);
    dw[n].gamma_h = grad_of(of.gamma_h);
    dw[n].beta_h = grad_of(of.beta_h);
  }

  args.read_contents();
  arrays.settle();
  LayerBackward layer = arrays.describe(args, dh0, dc0);
  layer.x = args.x.data();
  layer.dx = dx.data;
  layer.x_map = args.map_of(args.x);
  layer.dx_map = args.contiguous_map(I);
  layer.num_threads = threads_for(args, num_threads);
  LayerCell cell;
  if (args.cell) layer.cell = &(cell = args.describe_cell(arrays.y));
  for (int n = 0; n < args.D; ++n) {
    cell.direction[n].d_peephole = dw[n].peephole.data;
    cell.direction[n].d_gamma = dw[n].gamma.data;
    cell.direction[n].d_beta = dw[n].beta.data;
    cell.direction[n].d_gamma_h = dw[n].gamma_h.data;
    cell.direction[n].d_beta_h = dw[n].beta_h.data;
    const bool tensorflow = args.cell && args.cell->tensorflow;
    layer.direction[n].grads = {has(needs, Needs::kWeights),
                                dw[n].w_ih.data,
                                tensorflow ? dw[n].w_ih.at(I * 4 * H) : dw[n].w_hh.data,
                                dw[n].b_ih.data,
                                dw[n].b_hh.data,
                                dw[n].w_hr.data};
  }

  if (H == 0 && !dx.data) layer.shape.B = 0;  // all that is asked for is empty

  const cpu::Plan plan = cpu::plan_backward(layer);
  {
    const GilRelease release(!cpu::is_brief(layer.shape));
    cpu::kernels().layer_backward(layer, plan);
  }
  const py::object weight_grads = has(needs, Needs::kWeights) ? py::object(dweights) : py::none();
  return py::make_tuple(dx.object, dh0.object, dc0.object, weight_grads);
}

}  // namespace lstm_ext::ops
