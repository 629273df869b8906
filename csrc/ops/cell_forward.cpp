#include "../cpu/kernels.h"
#include "../cpu/team.h"
#include "ops.h"

namespace lstm_ext::ops {

// A cell is a sequence of one step: the same kernel, without the arrays that only a sequence has.
py::tuple cell_forward(py::handle x_, py::handle h_, py::handle c_, py::handle w_ih_, py::handle w_hh_,
                       py::handle b_ih_, py::handle b_hh_, int num_threads) {
  const Array x(x_, "x"), h(h_, "h"), c(c_, "c"), w_ih(w_ih_, "w_ih"), w_hh(w_hh_, "w_hh"), b_ih(b_ih_, "b_ih"),
      b_hh(b_hh_, "b_hh");
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
  for (const Array* state : {&h, &c}) {
    if (*state && batched) state->expect_shape({B, H});
    if (*state && !batched) state->expect_shape({H});
  }

  const Allocator allocator(x);
  const Shape shape = batched ? Shape{B, H} : Shape{H};
  const Output h_next = allocator.empty(dtype, shape);
  const Output c_next = allocator.empty(dtype, shape);

  LayerForward layer{};
  layer.dtype = dtype;
  layer.shape = {1, B, I, H, H, false};
  layer.x = x.data();
  layer.x_map = {0, x.matrix().row_stride, nullptr};
  layer.y_map = {0, H, nullptr};
  layer.num_directions = 1;
  layer.num_threads = num_threads > 0 ? num_threads : cpu::default_threads();
  ForwardDirection& to = layer.direction[0];
  to.weights = {w_ih.matrix(), w_hh.matrix(), b_ih.data(), b_hh.data(), {}};
  to.state = {h.matrix(), c.matrix()};
  to.y = h_next.data;
  to.c_n = c_next.data;

  {
    py::gil_scoped_release release;
    cpu::kernels().layer_forward(layer);
  }
  return py::make_tuple(h_next.object, c_next.object);
}

}  // namespace lstm_ext::ops
