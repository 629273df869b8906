#include "../cpu/kernels.h"
#include "../cpu/team.h"
#include "layer_args.h"
#include "ops.h"

namespace lstm_ext::ops {
namespace {

constexpr int kNeedX = 1, kNeedH0 = 2, kNeedC0 = 4, kNeedWeights = 8;

// The gradient of, or what the forward pass left of, a sequence: absent, or exactly of this dtype and shape.
Array expect_like(const Array& x, py::handle object, const char* name, Dtype dtype, const Shape& shape) {
  Array array(object, name);
  if (!array) return array;
  array.expect_kind_of(x);
  array.expect_dtype(dtype);
  array.expect_shape(shape);
  return array;
}

struct WeightOutputs {
  Output w_ih, w_hh, b_ih, b_hh, w_hr;
};

}  // namespace

py::tuple layer_backward(py::handle dy_, py::handle dh_n_, py::handle dc_n_, py::handle dcells_, py::handle x,
                         py::handle h0, py::handle c0, py::sequence weights, py::handle y_, py::handle cells_,
                         py::handle gates_, py::handle lengths, py::handle resets, py::handle batch_sizes,
                         int directions, bool batch_first, int needs, int num_threads) {
  const LayerArgs args(x, h0, c0, weights, lengths, resets, batch_sizes, directions, batch_first);
  const auto [T, B, I, H, P, projected] = args.shape;
  const int64_t D = args.D;
  const Array dy = expect_like(args.x, dy_, "dy", args.dtype, args.sequence_shape(D * P));
  const Array dh_n = expect_like(args.x, dh_n_, "dh_n", args.dtype, {D, B, P});
  const Array dc_n = expect_like(args.x, dc_n_, "dc_n", args.dtype, {D, B, H});
  const Array dcells = expect_like(args.x, dcells_, "dcells", args.compute_dtype, args.saved_shape(H));
  const Array y = expect_like(args.x, y_, "y", args.dtype, args.sequence_shape(D * P));
  const Array cells = expect_like(args.x, cells_, "cells", args.compute_dtype, args.saved_shape(H));
  const Array gates = expect_like(args.x, gates_, "gates", args.dtype, args.saved_shape(4 * H));
  if (!y || !cells || !gates)
    throw py::type_error("y, cells, gates: expected what layer_forward left with save=2, got None");

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

  LayerBackward layer{};
  layer.dtype = args.dtype;
  layer.shape = args.shape;
  layer.masks = args.masks;
  layer.x = args.x.data();
  layer.dx = dx.data;
  layer.x_map = args.map_of(args.x);
  layer.dx_map = args.contiguous_map(I);
  layer.y_map = args.map_of(y);
  layer.dy_map = args.map_of(dy);
  layer.cells_map = args.saved_map_of(cells);
  layer.d_cells_map = args.saved_map_of(dcells);
  layer.gates_map = args.saved_map_of(gates);
  layer.num_directions = args.D;
  layer.num_threads = num_threads > 0 ? num_threads : cpu::default_threads();
  for (int n = 0; n < D; ++n) {
    BackwardDirection& to = layer.direction[n];
    to.reverse = args.reverse(n);
    to.weights = args.direction[n].pointers();
    to.state = args.state(n);
    to.y = column_of(y, n * P, args.dtype);
    to.cells = at(cells, n, args.compute_dtype);
    to.gates = at(gates, n, args.dtype);
    to.dy = column_of(dy, n * P, args.dtype);
    to.d_cells = at(dcells, n, args.compute_dtype);
    to.dh_n = matrix_at(dh_n, n, args.dtype);
    to.dc_n = matrix_at(dc_n, n, args.dtype);
    to.dh0 = offset_by(dh0, n * B * P, args.dtype);
    to.dc0 = offset_by(dc0, n * B * H, args.dtype);
    to.grads = {(needs & kNeedWeights) != 0,
                dw[n].w_ih.data,
                dw[n].w_hh.data,
                dw[n].b_ih.data,
                dw[n].b_hh.data,
                dw[n].w_hr.data};
  }

  {
    py::gil_scoped_release release;
    cpu::kernels().layer_backward(layer);
  }
  const py::object weight_grads = needs & kNeedWeights ? py::object(dweights) : py::none();
  return py::make_tuple(dx.object, dh0.object, dc0.object, weight_grads);
}

}  // namespace lstm_ext::ops
