#include "../cpu/levels.h"
#include "../cpu/team.h"
#include "layer_args.h"
#include "ops.h"

namespace lstm_ext::ops {
namespace {

struct WeightOutputs {
  Output w_ih, w_hh, b_ih, b_hh, w_hr;
};

}  // namespace

py::tuple layer_backward(py::handle dy, py::handle dh_n, py::handle dc_n, py::handle dcells, py::handle x,
                         py::handle h0, py::handle c0, py::sequence weights, py::handle y, py::handle cells,
                         py::handle gates, py::handle lengths, py::handle resets, py::handle batch_sizes,
                         int directions, bool batch_first, int needs, int num_threads) {
  const LayerArgs args(x, h0, c0, weights, lengths, resets, batch_sizes, directions, batch_first);
  const auto [T, B, I, H, P, projected] = args.shape;
  const int64_t D = args.D;
  const BackwardArrays arrays(args, args.x, dy, dh_n, dc_n, dcells, y, cells, gates);

  const Allocator allocator(args.x);
  const auto wanted = [&](int need, const Shape& shape) {
    return needs & need ? allocator.empty(args.dtype, shape) : Output{};
  };
  const Output dx = wanted(kNeedX, args.sequence_shape(I));
  const Output dh0 = wanted(kNeedH0, {D, B, P});
  const Output dc0 = wanted(kNeedC0, {D, B, H});
  WeightOutputs dw[2];
  py::list dweights;
  for (int n = 0; n < D; ++n) {
    const auto grad_of = [&](const Array& weight) {
      Output grad = weight ? wanted(kNeedWeights, weight.shape()) : Output{};
      if (!grad.object.is_none()) dweights.append(grad.object);
      return grad;
    };
    const DirectionArrays& of = args.direction[n];
    dw[n].w_ih = grad_of(of.w_ih);  // in the order of the list
    dw[n].w_hh = grad_of(of.w_hh);
    dw[n].b_ih = grad_of(of.b_ih);
    dw[n].b_hh = grad_of(of.b_hh);
    dw[n].w_hr = grad_of(of.w_hr);
  }

  LayerBackward layer = arrays.describe(args, dh0, dc0);
  layer.x = args.x.data();
  layer.dx = dx.data;
  layer.x_map = args.map_of(args.x);
  layer.dx_map = args.contiguous_map(I);
  layer.num_threads = num_threads > 0 ? num_threads : cpu::default_threads();
  for (int n = 0; n < D; ++n) {
    layer.direction[n].grads = {(needs & kNeedWeights) != 0,
                                dw[n].w_ih.data,
                                dw[n].w_hh.data,
                                dw[n].b_ih.data,
                                dw[n].b_hh.data,
                                dw[n].w_hr.data};
  }

  const cpu::Plan plan = cpu::plan_backward(layer);
  {
    py::gil_scoped_release release;
    cpu::kernels().layer_backward(layer, plan);
  }
  const py::object weight_grads = needs & kNeedWeights ? py::object(dweights) : py::none();
  return py::make_tuple(dx.object, dh0.object, dc0.object, weight_grads);
}

}  // namespace lstm_ext::ops
