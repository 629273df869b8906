#include "cell_args.h"

namespace lstm_ext::ops {

CellShape check_cell(const Array& x, const Array& h, const Array& c, const Array& w_ih, const Array& w_hh,
                     const Array& b_ih, const Array& b_hh) {
  if (!x || !w_ih || !w_hh) throw py::type_error("x, w_ih, w_hh: expected arrays, got None");
  const Dtype dtype = x.float_dtype();
  for (const Array* array : {&h, &c, &w_ih, &w_hh, &b_ih, &b_hh}) {
    array->expect_kind_of(x);
    if (*array) array->expect_dtype(dtype);
  }
  const bool batched = x.ndim() != 1;
  if (batched) x.expect_dims(2);
  w_hh.expect_dims(2);
  const int64_t B = batched ? x.size(0) : 1, I = x.size(batched ? 1 : 0), H = w_hh.size(1);
  w_ih.expect_shape({4 * H, I});
  w_hh.expect_shape({4 * H, H});
  for (const Array* bias : {&b_ih, &b_hh}) {
    if (*bias) bias->expect_shape({4 * H});
  }
  if (static_cast<bool>(h) != static_cast<bool>(c)) throw py::type_error("h, c: expected both or neither, got one");
  if (static_cast<bool>(b_ih) != static_cast<bool>(b_hh))
    throw py::type_error("b_ih, b_hh: expected both or neither, got one");
  const Shape state = batched ? Shape{B, H} : Shape{H};
  for (const Array* array : {&h, &c}) {
    if (*array) array->expect_shape(state);
  }
  return {dtype, B, I, H, state};
}

LayerForward cell_layer(const CellShape& cell, const Array& x, const Array& h, const Array& c, const Array& w_ih,
                        const Array& w_hh, const Array& b_ih, const Array& b_hh, const Output& h_next,
                        const Output& c_next) {
  LayerForward layer{};
  layer.dtype = cell.dtype;
  layer.shape = {1, cell.B, cell.I, cell.H, cell.H, false};
  layer.x = x.data();
  layer.x_map = {0, x.matrix().row_stride, nullptr};
  layer.y_map = {0, cell.H, nullptr};
  layer.num_directions = 1;
  ForwardDirection& to = layer.direction[0];
  to.weights = {w_ih.matrix(), w_hh.matrix(), b_ih.data(), b_hh.data(), {}};
  to.state = {h.matrix(), c.matrix()};
  to.y = h_next.data;
  to.c_n = c_next.data;
  return layer;
}

}  // namespace lstm_ext::ops
